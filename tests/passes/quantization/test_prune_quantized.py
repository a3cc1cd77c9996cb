"""Pruning what was quantized, and quantizing what was pruned: scales stay with channels, kernels with integers."""

from pathlib import Path

import onnx
import pytest
import torch

import regauge
from onnx_models import NETWORK, NETWORK_WEIGHTS, model_of
from regauge.backends.run_onnxruntime import Session
from regauge.ir.graph import Graph, Parameter
from regauge.ir.storage.quantized_layers import quantized_layers

PRUNE = "prune{ratio=0.5,compensate=false}"
OPTIONS = ["target=ort-x86", "target=ort-x86-avx2", "target=ort-arm", "target=tensorrt", "activations=dynamic"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "network.onnx"
    onnx.save(model_of(NETWORK, NETWORK_WEIGHTS), path)
    return path


def scales(graph: Graph) -> dict[str, tuple[Parameter, int]]:
    """The scales of stored weights, each with the size of the axis that they belong to."""
    found = {}
    for node in graph.nodes:
        codes, scale = node.inputs[:2] if node.op == "dequantize" else (None, None)
        if isinstance(codes, Parameter) and isinstance(scale, Parameter) and scale.rank == 1:
            found[scale.name] = scale, int(codes.shape[node.attributes["axis"]])
    return found


@pytest.mark.parametrize("options", OPTIONS)
def test_scales_are_cut_with_their_channels(source: Path, tmp_path: Path, options: str) -> None:
    batches = [(torch.randn(4, 3, 8, 8),) for _ in range(2)]
    whole = regauge.optimize(regauge.load(source), f"quantize{{{options}}}", data=batches)
    cut = regauge.optimize(whole, PRUNE)
    before, after = scales(whole), scales(cut)
    assert before.keys() == after.keys() and before
    for name, (scale, size) in after.items():
        assert scale.shape == (size,)
        assert set(scale.tensor.tolist()) <= set(before[name][0].tensor.tolist())
    assert any(after[name][1] < before[name][1] for name in after) or options == "activations=dynamic"
    cut.to_onnx(tmp_path / "cut.onnx")  # the audit is part of it
    assert len(quantized_layers(cut)) == len(quantized_layers(whole))
    x = batches[0][0]
    (found,), (wanted,) = Session(tmp_path / "cut.onnx").run([x]), cut.run((x,))
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


@pytest.mark.parametrize("options", OPTIONS)
def test_what_was_pruned_is_quantized_alike(source: Path, tmp_path: Path, options: str) -> None:
    """The same layers multiply integers whichever comes first, but for a convolution that was made depthwise."""
    batches = [(torch.randn(4, 3, 8, 8),) for _ in range(2)]
    cut = regauge.optimize(regauge.load(source), PRUNE)
    small = regauge.optimize(cut, f"quantize{{{options}}}", data=batches)
    assert all(scale.shape == (size,) for scale, size in scales(small).values())
    small.to_onnx(tmp_path / "small.onnx")
    first = regauge.optimize(regauge.load(source), [f"quantize{{{options}}}", PRUNE], data=batches)
    depthwise = small.report.passes[0].left.get("depthwise convolutions are slower with integers", 0)
    assert len(quantized_layers(small)) + depthwise == len(quantized_layers(first))
