"""QuantizeLinear and DequantizeLinear against onnxruntime, in every form of scales, and what is cut through them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import regauge
from onnx_node import check_node, normal, operators
from onnx_simplified import parsed
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph

RNG = np.random.default_rng(0)
CODES = RNG.integers(-128, 128, (4, 6)).astype(np.int8)
HALVES = np.array([0.25, 0.5, 1, 2], np.float32)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_one_scale_for_all(kind: type) -> None:
    """Halves are rounded to even, and what lies beyond the ends is clipped."""
    x = np.concatenate([4 * normal(50), np.arange(-6, 6, dtype=np.float32) / 8, [300, -300]]).astype(np.float32)
    for scale in (np.float32(0.25), np.array([0.25], np.float32)):
        zero = np.full(scale.shape, 3, kind)
        assert "quantize" in operators(check_node("QuantizeLinear", [x, scale, zero]))
    assert "dequantize" in operators(check_node("DequantizeLinear", [CODES, np.float32(0.1), np.int8(-4)]))
    assert operators(check_node("QuantizeLinear", [x, np.float32(0.25)])) == ["quantize"]  # to unsigned bytes


def test_a_scale_for_each_index() -> None:
    x = 9 * normal(4, 6)
    assert operators(check_node("QuantizeLinear", [x, HALVES, np.zeros(4, np.int8)], axis=0)) == ["quantize"]
    zeros = np.array([1, -2, 3, -4], np.int8)
    assert operators(check_node("DequantizeLinear", [CODES, HALVES, zeros], axis=-2)) == ["dequantize"]


def test_a_scale_for_each_block() -> None:
    scales = np.abs(normal(4, 3)) + 0.1
    found = check_node("DequantizeLinear", [CODES, scales], opset=21, axis=1, block_size=2)
    assert operators(found) == ["dequantize"]


def test_blocks_are_cut_whole() -> None:
    """Of an input axis in blocks of 4 whole blocks go, with their scales."""
    graph = Graph()
    build = Builder(graph)
    hidden = build.linear(build.input("x", (3, 5), torch.float32), build.parameter("first", torch.randn(8, 5)))
    codes = build.parameter("codes", torch.randint(-8, 8, (6, 8)).to(torch.int8), trainable=False)
    scales = build.parameter("scales", torch.rand(6, 2) + 0.5, trainable=False)
    weight = build.dequantize(codes, scales, axis=1, block_size=4, bits=4)
    graph.outputs = [build.linear(build.relu(hidden), weight)]
    cut = regauge.optimize(graph, "prune{ratio=0.5,compensate=false}")
    assert cut.parameters["codes"].shape == (6, 4) and cut.parameters["scales"].shape == (6, 1)
    assert cut.parameters["first"].shape == (4, 5)
    kept = [i for i in range(2) if torch.equal(cut.parameters["scales"].tensor[:, 0], scales.tensor[:, i])][0]
    masked = graph.copy()
    x = torch.randn(3, 5)
    mask = torch.zeros(8)
    mask[4 * kept : 4 * kept + 4] = 1
    first, back = masked.parameters["first"].tensor, scales.tensor.repeat_interleave(4, 1) * codes.tensor
    assert torch.allclose(cut.run((x,))[0], ((x @ first.t()).relu() * mask) @ back.t(), atol=1e-4)


def test_constants_that_are_stored_small_are_not_folded() -> None:
    """To compute them ahead would undo the quantization."""
    nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["w"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    constants = [onnx.numpy_helper.from_array(CODES, "q"), onnx.numpy_helper.from_array(np.float32(0.1), "s")]
    inputs, outputs = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 4]), ("y", [2, 6]))
    )
    model = helper.make_model(helper.make_graph(nodes, "g", [inputs], [outputs], constants))
    small = regauge.optimize(regauge.load(model), "simplify")
    assert "dequantize" in operators(small)


def test_a_quantized_file_is_cut(tmp_path: Path) -> None:
    """Between two layers: integers, scales, zero points and biases of the Dim go together."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    quantized (float[n, 8] x) => (float[n, 4] y) {
      xq = QuantizeLinear (x, xs, xz)
      xd = DequantizeLinear (xq, xs, xz)
      wd = DequantizeLinear <axis = 1> (w, ws, wz)
      h = MatMul (xd, wd)
      r = Relu (h)
      vd = DequantizeLinear <axis = 1> (v, vs)
      y = MatMul (r, vd)
    }
    """
    weights = {
        "xs": np.float32(0.05), "xz": np.uint8(120), "w": RNG.integers(-127, 127, (8, 16)).astype(np.int8),
        "ws": np.abs(normal(16)) + 0.1, "wz": np.zeros(16, np.int8), "v": RNG.integers(-9, 9, (16, 4)).astype(np.int8),
        "vs": HALVES,
    }  # fmt: skip
    graph = regauge.load(parsed(text, **weights))
    assert graph.parameters["w"].kind == "parameter" and not graph.parameters["w"].trainable
    cut = regauge.optimize(graph, "prune{ratio=0.5,compensate=false}")
    shapes = {name: tuple(cut.parameters[name].shape) for name in ("w", "ws", "wz", "v", "vs")}
    assert shapes == {"w": (8, 8), "ws": (8,), "wz": (8,), "v": (8, 4), "vs": (4,)}
    cut.to_onnx(tmp_path / "cut.onnx")
    x = torch.randn(3, 8)
    assert torch.allclose(regauge.load(tmp_path / "cut.onnx").run((x,))[0], cut.run((x,))[0])


def test_types_that_torch_lacks_are_kept() -> None:
    four = helper.make_tensor_value_info("q", TensorProto.INT4, [2, 4])  # constants of it are read, see the files
    nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["w"]), helper.make_node("Add", ["x", "w"], ["y"])]
    inputs, outputs = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4]) for n in "xy")
    scale = onnx.numpy_helper.from_array(np.float32(0.5), "s")
    graph = helper.make_graph(nodes, "g", [inputs, four], [outputs], [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.warns(regauge.RegaugeWarning, match="it dequantizes int4"):
        loaded = regauge.load(model)
    assert operators(loaded) == ["onnx_call", "add"]
