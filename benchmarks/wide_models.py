"""A wide list of 240 architectures of timm, torchvision and transformers, for ``coverage.py --models wide``.

Names: ``timm:<model>:<image side>``, ``torchvision:<model>:<input>`` and ``transformers:<class>``. Weights are random;
nothing is fetched. Needs only the three libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import wide_transformers
from benchmarks.model_case import Case, import_torchvision

_TIMM = {
    64: """regnetz_b16 resnest14d skresnet18 eca_resnext26ts ecaresnet26t cspresnet50 darknet17
    cs3darknet_focus_s gernet_s efficientvit_b0 mobileone_s0 mobilenetv4_conv_small_035 repghostnet_050
    repvit_m0_9 rexnet_100 hardcorenas_a tinynet_e lcnet_035 mixnet_s ghostnetv2_100 ghostnetv3_050
    mnasnet_small mobilenetv2_035 efficientnet_cc_b0_4e efficientnet_b0_g8_gn efficientnet_b0_g16_evos
    hgnetv2_b0 inception_next_atto starnet_s1 mambaout_femto fasternet_t0 shvit_s1 caformer_s18
    poolformerv2_s12 convnextv2_atto convnext_zepto_rms nf_regnet_b0 resnetv2_50x1_bit resnetblur18""".split(),
    128: "csatv2 mobilevitv2_050 xception41".split(),
    224: """efficientvit_m0 swiftformer_xs efficientformerv2_s0 efficientvim_m1 iformer_t pit_xs_distilled_224
    convit_tiny gcvit_xxtiny hiera_tiny_224 coat_lite_tiny levit_conv_128s eva02_tiny_patch14_224
    vit_srelpos_small_patch16_224""".split(),
    256: "halonet26t lambda_resnet26t bat_resnext26ts vit_dpwee_patch16_reg1_gap_256".split(),
}
_TORCHVISION = {
    "64": """googlenet mnasnet0_5 mobilenet_v3_large squeezenet1_1 shufflenet_v2_x1_5 regnet_y_400mf
    lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large swin_v2_t""".split(),
    "video": "mc3_18 r2plus1d_18".split(),
    "pyramid": "fasterrcnn_mobilenet_v3_large_fpn".split(),
}
_INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "64": lambda: torch.randn(2, 3, 64, 64),
    "video": lambda: torch.randn(1, 3, 8, 56, 56),
    "pyramid": lambda: torch.randn(1, 3, 64, 64),
}

NAMES: list[str] = [
    *(f"timm:{name}:{side}" for side, group in _TIMM.items() for name in group),
    *(f"torchvision:{name}:{kind}" for kind, group in _TORCHVISION.items() for name in group),
    *(f"transformers:{name}" for name in wide_transformers.names()),
]

REFUSED: dict[str, str] = {
    "transformers:RwkvForCausalLM": "the model writes into a parameter while it runs",
    "transformers:LEDForConditionalGeneration": "torch.export: a Python branch depends on values of the mask",
}
"""Models of the list that cannot be captured, and why: both need a change of the model."""


def build(name: str, *, seed: int = 0) -> Case:
    """A model of the list in evaluation mode, with random weights and inputs. Raises ValueError for another name."""
    if name not in NAMES:
        raise ValueError(f"{name} is not on the wide list of benchmarks/wide_models.py")
    torch.manual_seed(seed)
    import_torchvision()
    library, _, rest = name.partition(":")
    inputs: tuple[Any, ...] | dict[str, Any]
    if library == "transformers":
        model, inputs = wide_transformers.build(rest)
    else:
        model_name, _, kind = rest.partition(":")
        model = _timm(model_name) if library == "timm" else _torchvision(model_name, kind)
        inputs = (torch.randn(2, 3, int(kind), int(kind)) if library == "timm" else _INPUTS[kind](),)
    return Case(name, model.eval(), inputs, [], wide_transformers.tensors)


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _torchvision(name: str, kind: str) -> nn.Module:
    """A model without pretrained weights; of a detector its backbone, which gives a feature pyramid."""
    import inspect

    from torchvision import models

    builder = models.get_model_builder(name)
    options = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    model: nn.Module = builder(**options)
    return model.get_submodule("backbone") if kind == "pyramid" else model
