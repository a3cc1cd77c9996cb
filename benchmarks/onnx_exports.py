"""Small networks and the ways to export them as ONNX files: what benchmarks of ONNX tools run on.

Weights, biases and statistics are redrawn, so that errors show. Files are kept in a folder of the system's temporary
one and made once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.model_case import SHARED, import_torchvision, redraw
from benchmarks.zoo import build as build_case

FLAVOURS = ("dynamo", "raw", "dynamic", "torchscript")
FOLDER = Path(tempfile.gettempdir()) / "regauge-onnx-exports"


class Positional(nn.Module):
    """A transformers model whose inputs go by position and that gives one tensor: what all exporters take."""

    def __init__(self, model: nn.Module, names: list[str], pick: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.names, self.pick = model, names, pick

    def forward(self, *inputs: Any) -> Any:
        return self.pick(self.model(**dict(zip(self.names, inputs, strict=True))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.rnn = kind(24, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.rnn(self.embed(ids))[0])
        return result


class UNet(nn.Module):
    """Convolutions, a transposed one, a skip connection, bilinear resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.GELU())
        self.up = nn.Sequential(nn.ConvTranspose2d(32, 16, 2, 2), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Conv2d(32, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down(x)
        b = torch.cat([a, self.up(self.middle(a))], 1)
        return nn.functional.interpolate(self.head(b), scale_factor=2, mode="bilinear")


class Detector(nn.Module):
    """A detector of one shot: separable convolutions, boxes and classes at two sizes of the image, decoded boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self.block(3, 16, 3, 2)
        self.low = nn.Sequential(*(self.separable(16, 32, 2), self.separable(32, 32, 1)))
        self.middle = nn.Sequential(*(self.separable(i, 64, s) for i, s in ((32, 2), (64, 1), (64, 1))))
        self.high = nn.Sequential(*(self.separable(i, 128, s) for i, s in ((64, 2), (128, 1))))
        self.boxes = nn.ModuleList(nn.Conv2d(width, 12, 3, padding=1) for width in (64, 128))
        self.classes = nn.ModuleList(nn.Conv2d(width, 6, 3, padding=1) for width in (64, 128))

    @staticmethod
    def block(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    def separable(self, inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(self.block(inputs, inputs, 3, stride, inputs), self.block(inputs, outputs, 1, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        middle = self.middle(self.low(self.stem(x)))
        images = (middle, self.high(middle))
        boxes = self._rows(self.boxes, images, 4)
        centre, size = boxes[..., :2].sigmoid(), boxes[..., 2:].exp()
        return torch.cat([centre - size / 2, centre + size / 2], -1), self._rows(self.classes, images, 2).softmax(-1)

    def _rows(self, heads: nn.ModuleList, images: tuple[torch.Tensor, ...], width: int) -> torch.Tensor:
        found = [head(image).permute(0, 2, 3, 1) for head, image in zip(heads, images, strict=True)]
        return torch.cat([each.reshape(each.shape[0], -1, width) for each in found], 1)


@dataclass(frozen=True)
class Network:
    """One network: how to make it, example inputs, and which axes of them are dynamic."""

    name: str
    make: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]
    dynamic: dict[int, str]


def timm_network(name: str, size: int) -> Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    def make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        case = build_case(f"timm:{name}:{size}")
        return case.model, case.args

    return make


def _transformer(family: str) -> Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    def make() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        case = build_case(f"hf:{family}")
        names = list(case.kwargs)
        return Positional(case.model, names, case.outputs), tuple(case.kwargs.values())

    return make


IMAGE, TOKENS = {0: "batch"}, {0: "batch", 1: "length"}
NETWORKS = [
    *(Network(name, timm_network(name, size), IMAGE) for name, size in [
        ("resnet18", 64), ("mobilenet_v3_small@tv", 64), ("shufflenet_v2_x0_5@tv", 64), ("densenet121", 64),
        ("efficientnet_b0", 64), ("regnety_002", 64), ("convnext_atto", 64), ("vit_tiny_patch16_224", 224),
        ("swin_tiny_patch4_window7_224", 224), ("mobilevit_xxs", 128), ("repvgg_a0", 64), ("ghostnet_100", 64),
        ("mixer_s32_224", 224), ("hrnet_w18_small", 64),
    ]),
    *(Network(name, _transformer(name), TOKENS) for name in ("bert", "gpt2", "llama", "t5", "whisper", "clip")),
    Network("unet", lambda: (UNet(), (torch.randn(2, 3, 32, 32),)), IMAGE),
    Network("lstm", lambda: (Recurrent(nn.LSTM), (torch.randint(0, 50, (2, 9)),)), TOKENS),
    Network("gru", lambda: (Recurrent(nn.GRU), (torch.randint(0, 50, (2, 9)),)), TOKENS),
]  # fmt: skip


def _torchvision_network(
    make: Callable[[Any], nn.Module], size: int
) -> Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    def build() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        import_torchvision()
        return make(importlib.import_module("torchvision").models), (torch.randn(1, 3, size, size),)

    return build


def _small_vit() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    import_torchvision()  # timm does
    model = importlib.import_module("timm").models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=192, depth=2, num_heads=3, num_classes=10
    )
    return model, (torch.randn(1, 3, 32, 32),)


# One network of each of the six kinds on which the best of today's tools left raw exports 0.64 of their latency.
SIX_KINDS = [
    Network(
        "mobilenet_v3_small_10",
        _torchvision_network(lambda models: models.mobilenet_v3_small(num_classes=10), 224),
        IMAGE,
    ),
    Network(
        "resnet10",
        _torchvision_network(lambda models: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10), 64),
        IMAGE,
    ),
    Network("vit_small_32", _small_vit, IMAGE),
    *(network for network in NETWORKS if network.name in ("bert", "llama")),
    Network("detector", lambda: (Detector(), (torch.randn(1, 3, 128, 128),)), IMAGE),
]


def export(network: Network, flavour: str) -> Path | None:
    """The file of a network in one flavour; None where the exporter fails. The message is kept beside it."""
    path = FOLDER / f"{network.name.replace('@', '-')}-{flavour}.onnx"
    failed = path.with_suffix(".failed")
    if path.exists():
        return path
    if failed.exists():
        return None
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, inputs = network.make()
    redraw(model.eval())
    try:
        with _quietly():
            _export(model.eval(), inputs, path, flavour, network.dynamic)
    except Exception as error:
        failed.write_text(f"{type(error).__name__}: {error}")
        return None
    return path


def _export(model: nn.Module, inputs: tuple[Any, ...], path: Path, flavour: str, dynamic: dict[int, str]) -> None:
    if flavour == "torchscript":
        torch.onnx.export(model, inputs, str(path), dynamo=False)
        return
    options: dict[str, Any] = {"optimize": False} if flavour == "raw" else {}
    if flavour == "dynamic":
        shapes = tuple({axis: torch.export.Dim.DYNAMIC for axis in dynamic if axis < x.dim()} for x in inputs)
        options["dynamic_shapes"] = (shapes,) if isinstance(model, Positional) else shapes
    torch.onnx.export(model, inputs, str(path), dynamo=True, external_data=False, verbose=False, **options)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def real_files() -> list[Path]:
    """The real ONNX files of ``shared/corpus``, where that lies beside the repository."""
    return sorted((SHARED / "corpus" / "onnx").glob("*.onnx"))


def light_files() -> list[Path]:
    """The light models of the onnx package: weights are filled when the model runs, IR version 3."""
    import onnx

    return sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("*.onnx"))
