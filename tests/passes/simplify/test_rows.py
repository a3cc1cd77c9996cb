"""What treats rows alike works on matrices, in files: never more nodes, and nothing that needs the other axes."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import regauge
from onnx_simplified import assert_equal_runs, normal, parsed, simplified

HEAD = """<ir_version: 8, opset_import: ["" : 17]> net (float[SHAPE] x) => (float[SHAPE] y) {"""
BLOCK = """
  n = LayerNormalization (x, gain, shift)
  h = MatMul (n, up)
  u = Add (h, wide)
  a = Relu (u)
  d = MatMul (a, down)
  v = Add (d, narrow)
  y = Add (v, x)
}"""
WEIGHTS = {
    "gain": normal(4), "shift": normal(4), "up": normal(4, 6), "wide": normal(6), "down": normal(6, 4),
    "narrow": normal(4),
}  # fmt: skip


def model(body: str, shape: str = "2, 3, 4") -> onnx.ModelProto:
    used = {name: array for name, array in WEIGHTS.items() if name in body}
    return parsed(HEAD.replace("SHAPE", shape) + body, **used)


def kinds(small: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in small.graph.node]


@pytest.mark.parametrize("shape", ["2, 3, 4", "n, 3, 4", "1, 3, 4"])
def test_a_feed_forward_layer_works_on_a_matrix(shape: str, tmp_path: Path) -> None:
    before = model(BLOCK, shape)
    small = simplified(before, tmp_path)
    found = kinds(small)
    assert [kind for kind in found if kind not in ("Reshape", "Squeeze", "Unsqueeze")] == [
        "LayerNormalization", "Gemm", "Relu", "Gemm", "Add"
    ]  # fmt: skip
    assert len(found) == len(before.graph.node)
    assert_equal_runs(before, small, {"x": normal(2 if shape[0] == "2" else 1, 3, 4)})
    assert kinds(simplified(small, tmp_path)) == found


def test_a_batch_of_any_size_is_written_as_such(tmp_path: Path) -> None:
    before = model(BLOCK, "n, 3, 4")
    small = simplified(before, tmp_path)
    assert "Shape" not in kinds(small)
    assert_equal_runs(before, small, {"x": normal(1, 3, 4)}, {"x": normal(5, 3, 4)})


def test_two_dynamic_sizes_could_not_be_told_apart_again(tmp_path: Path) -> None:
    before = model(BLOCK, "n, s, 4")
    assert kinds(simplified(before, tmp_path)) == kinds(before)


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul (x, square)  y = Softmax <axis = 1> (h) }",
        "r = Relu (x)  h = MatMul (r, square)  u = Add (h, narrow)  t = Softmax <axis = 1> (u)  y = Add (t, r) }",
        "h = MatMul (x, square)  u = Add (h, places)  y = Relu (u) }",
    ],
    ids=["no-bias", "one-bias", "bias-of-places"],
)
def test_what_needs_more_reshapes_than_it_saves_stays(body: str, tmp_path: Path) -> None:
    """One Gemm pays for one reshape, not for two; a table for all places cannot be added to rows."""
    before = model(body)
    for name, array in (("square", normal(4, 4)), ("places", normal(3, 4))):
        before.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    small = simplified(before, tmp_path)
    assert kinds(small) == kinds(before)


def test_reshapes_that_are_there_are_no_longer_needed(tmp_path: Path) -> None:
    """Rows that come as a matrix, as heads, or leave as such: a residual stream between two attentions."""
    body = """
      r = Reshape (x, rows)
      g = Gemm (r, down, narrow)
      t = Reshape (g, tall)
      n = LayerNormalization (t, gain, shift)
      f = Reshape (n, flat)
      h = Gemm (f, up, wide)
      y = Reshape (h, heads)
    }"""
    before = parsed(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[2, 3, 6] x) => (float[2, 3, 2, 3] y) {' + body, **WEIGHTS
    )
    shapes = {"rows": (6, 6), "tall": (2, 3, 4), "flat": (-1, 4), "heads": (2, 3, 2, 3)}
    for name, shape in shapes.items():
        before.graph.initializer.append(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(shape)], shape))
    small = simplified(before, tmp_path)
    assert kinds(small) == ["Reshape", "Gemm", "LayerNormalization", "Gemm", "Reshape"]
    assert_equal_runs(before, small, {"x": normal(2, 3, 6)})


def test_products_without_a_bias_take_in_the_sum_behind_them(tmp_path: Path) -> None:
    body = """
      h = MatMul (x, up)
      a = Relu (h)
      d = MatMul (a, down)
      s = Add (d, x)
      e = MatMul (s, up)
      b = Relu (e)
      f = MatMul (b, down)
      y = Add (s, f)
    }"""
    small = simplified(before := model(body), tmp_path)
    gemms = [node for node in small.graph.node if node.op_type == "Gemm"]
    assert sorted(kinds(small)) == ["Gemm", "Gemm", "MatMul", "MatMul", "Relu", "Relu", "Reshape", "Reshape"]
    assert all(len(node.input) == 3 for node in gemms)
    assert_equal_runs(before, small, {"x": normal(2, 3, 4)})


def test_a_graph_from_torch_keeps_its_axes() -> None:
    graph = regauge.capture(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)), (torch.randn(2, 3, 4),))
    assert "reshape" not in [node.op for node in regauge.optimize(graph, "simplify").nodes]
