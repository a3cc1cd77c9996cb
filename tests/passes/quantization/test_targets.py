"""Where integers begin and end in files for each runtime, by the nodes that are written."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

import regauge
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph


class Shortcuts(nn.Module):
    """Two convolutions around a shortcut, two added to one another, a join of both, and a norm in front of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last, self.norm, self.head = nn.Conv2d(16, 8, 1), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.stem(x)).relu()
        x = (x + self.two(self.one(x).relu())).relu()
        y = (self.left(x) + self.right(x)).relu()
        z = self.last(torch.cat([x, y], 1)).relu()
        return self.head(self.norm(z.mean((2, 3)))).softmax(-1)


def shortcuts() -> tuple[Graph, list[tuple[torch.Tensor]]]:
    model = Shortcuts()
    batches = [(torch.randn(4, 3, 8, 8),) for _ in range(3)]
    model(torch.cat([x for (x,) in batches]))
    return regauge.capture(model.eval(), batches[0]), batches


class File:
    """An ONNX file by names of values."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.constants = {t.name: numpy_helper.to_array(t) for t in self.model.graph.initializer}
        self.kinds = {t.name: t.data_type for t in self.model.graph.initializer}
        self.makers = {name: node for node in self.model.graph.node for name in node.output}

    def nodes(self, *ops: str) -> list[Any]:
        return [node for node in self.model.graph.node if node.op_type in ops]

    def maker(self, name: str) -> str:
        return self.makers[name].op_type if name in self.makers else "constant"


def written(options: str, folder: Path, given: tuple[Graph, list[Any]] | None = None) -> tuple[Graph, File]:
    graph, batches = shortcuts() if given is None else given
    small = regauge.optimize(graph, f"quantize{{{options}}}", data=batches)
    small.to_onnx(folder / "small.onnx")
    return small, File(folder / "small.onnx")


def test_tensorrt(tmp_path: Path) -> None:
    small, file = written("target=tensorrt", tmp_path)
    for node in file.nodes("QuantizeLinear", "DequantizeLinear"):
        zero = node.input[2] if len(node.input) > 2 else None
        assert zero is None or file.kinds[zero] == TensorProto.INT8 and not file.constants[zero].any()
    for node in file.nodes("QuantizeLinear"):
        assert file.constants[node.input[1]].ndim == 0  # one scale for an activation
    for node in file.nodes("Conv", "MatMul", "Gemm"):
        assert [file.maker(name) for name in node.input[:2]] == ["DequantizeLinear"] * 2
        scales = file.constants[file.makers[node.input[1]].input[1]]
        assert scales.ndim == 1 and len(scales) > 1
        assert all(file.maker(name) == "constant" and file.kinds[name] == TensorProto.FLOAT for name in node.input[2:])
    order = list(file.makers)
    sums = [node for node in file.nodes("Add") if "Conv" in map(file.maker, node.input)]
    assert sorted(file.maker(name) for node in sums for name in node.input) == ["Conv"] * 2 + ["DequantizeLinear"] * 2
    quantized = {name for node in file.nodes("QuantizeLinear") for name in node.input[:1] if file.maker(name) == "Conv"}
    taken = {name for node in sums for name in node.input if file.maker(name) == "Conv"}
    (addend,) = quantized  # nothing stands between a convolution and its clamp: this one is added to a later one
    assert addend not in taken and order.index(addend) < max(map(order.index, taken))
    for node in file.nodes("LayerNormalization", "Softmax"):
        assert file.maker(node.input[0]) != "DequantizeLinear"
    assert dict(small.report.passes[0].left) == {}  # the depthwise one is quantized


def test_joined_values_have_one_scale_for_tensorrt(tmp_path: Path) -> None:
    """What is read before and behind a join is quantized in the same steps, those of the wider range."""
    _, file = written("target=tensorrt,calibration=minmax", tmp_path)
    (join,) = file.nodes("Concat")
    readers = {name: node for node in file.nodes("QuantizeLinear") for name in node.input[:1]}
    joined = file.constants[readers[join.output[0]].input[1]]
    parts = [file.constants[readers[name].input[1]] for name in join.input if name in readers]
    assert parts and all(np.array_equal(part, joined) for part in parts)


def test_arm(tmp_path: Path) -> None:
    """Unsigned activations, signed weights, and convolutions of one channel each in integers."""
    small, file = written("target=ort-arm", tmp_path)
    assert not small.report.passes[0].left
    assert {file.kinds[node.input[2]] for node in file.nodes("QuantizeLinear")} == {TensorProto.UINT8}
    assert all(file.kinds[file.makers[node.input[1]].input[0]] == TensorProto.INT8 for node in file.nodes("Conv"))


def test_weights_alone_for_tensorrt(tmp_path: Path) -> None:
    """Four bits without zero points in blocks of 128 along the inputs of a product."""
    model = nn.Sequential(nn.Linear(256, 24), nn.GELU(), nn.Linear(24, 4)).eval()
    batches = [(torch.randn(8, 256),)]
    small, file = written("scheme=w4,target=tensorrt", tmp_path, (regauge.capture(model, batches[0]), batches))
    (back,) = file.nodes("DequantizeLinear")
    assert file.kinds[back.input[0]] == TensorProto.INT4 and len(back.input) == 2
    assert file.constants[back.input[1]].shape == (2, 24)
    assert {a.name: a.i for a in back.attribute} == {"axis": 0, "block_size": 128}
    assert dict(small.report.passes[0].left) == {
        "its inputs are no multiple of 128: tensorrt reads weights alone in blocks": 1
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("scheme=w8,target=tensorrt", "weights alone of 4 bits"),
        ("scheme=w4,target=tensorrt,symmetric=false", "no zero points"),
    ],
)
def test_what_a_runtime_does_not_have_is_refused(options: str, reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        regauge.optimize(shortcuts()[0], f"quantize{{{options}}}")
