"""Branches that are always taken, and loops of one iteration, take the place of their node in the written file."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import regauge
from onnx_models import model_of
from onnx_oracle import runtime_outputs
from onnx_simplified import graphs
from regauge.ir.errors import EmitError


def operators(model: onnx.ModelProto) -> Counter[str]:
    """Nodes of all scopes."""
    return Counter(node.op_type for graph in graphs(model.graph) for node in graph.node)


def simplified(model: onnx.ModelProto, path: Path, *feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The simplified model, which gives the same in onnxruntime as the original."""
    small = onnx.load(regauge.optimize(regauge.load(model), "simplify").to_onnx(path / "small.onnx"))
    onnx.checker.check_model(small, full_check=True)
    for given in feeds:
        for a, b in zip(runtime_outputs(model, given), runtime_outputs(small, given), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    return small


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


DEEP = """
<ir_version: 8, opset_import: ["" : 17]>
deep (float[batch, 4] x, bool c) => (float[batch, 4] y) {
  axis = Constant <value = int64 {0}> ()
  rank = Constant <value = int64 {2}> ()
  shape = Shape (x)
  size = Size (shape)
  two = Equal (size, rank)
  three = Not (two)
  y = If (two) <
    then_branch = one () => (float[batch, 4] h2) {
      k = Constant <value_float = 2.0> ()
      h = Mul (x, k)
      h2 = If (three) <
        then_branch = two_a () => (float[batch, 4] m) <float[4] w = {1.0, 2.0, 3.0, 4.0}> { m = Add (x, w) },
        else_branch = two_b () => (float[batch, 4] h3) <float[4] w = {5.0, 6.0, 7.0, 8.0}> {
          k2 = Constant <value_float = 3.0> ()
          m = Mul (h, w)
          h3 = If (two) <
            then_branch = three_a () => (float[batch, 4] a) {
              m2 = Add (m, k2)
              a = If (c) <
                then_branch = four_a () => (float[batch, 4] e) { p = Constant <value_float = 3.0> () e = Add (m2, p) },
                else_branch = four_b () => (float[batch, 4] f) { p = Constant <value_float = 4.0> () f = Mul (m2, p) }
              >
            },
            else_branch = three_b () => (float[batch, 4] m2) { m2 = Neg (m) }
          >
        }
      >
    },
    else_branch = other () => (float[batch, 4] h) { h = Neg (x) }
  >
}
"""


def test_branches_four_deep_move_with_constants_initializers_and_nested_graphs(tmp_path: Path) -> None:
    """Of four Ifs the one on ``c`` stays; ``w``, ``m`` and ``m2`` are names of several scopes, 3.0 occurs twice."""
    feeds = [{"x": normal(batch, 4), "c": np.array(c)} for batch in (1, 3) for c in (True, False)]
    small = simplified(onnx.parser.parse_model(DEEP), tmp_path, *feeds)
    assert operators(small) == {"Mul": 2, "Add": 2, "If": 1, "Constant": 1}
    (conditional,) = [node for node in small.graph.node if node.op_type == "If"]
    assert conditional.output == ["y"] and conditional.input == ["c"]
    assert sorted(i.name for i in small.graph.initializer) == ["k2", "w"]
    names = [name for graph in graphs(small.graph) for node in graph.node for name in node.output]
    assert len(names) == len(set(names))


def test_initializers_of_inlined_branches_move_too(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    moves (float[batch, 4] x) => (float[batch, 4] y) {
      yes = Constant <value = bool {1}> ()
      h = If (yes) <
        then_branch = one () => (float[batch, 4] a) <float[4] w = {1.0, 2.0, 3.0, 4.0}> { a = Add (x, w) },
        else_branch = two () => (float[batch, 4] a) <float[4] w = {5.0, 6.0, 7.0, 8.0}> { a = Mul (x, w) }
      >
      y = Relu (h)
    }
    """
    small = simplified(onnx.parser.parse_model(text), tmp_path, {"x": normal(2, 4)})
    assert [node.op_type for node in small.graph.node] == ["Add", "Relu"]
    assert [i.name for i in small.graph.initializer] == ["w"]
    assert [node.output[0] for node in small.graph.node] == ["a", "y"]


def test_a_loop_of_one_iteration_with_a_branch_that_reads_its_state(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    loops (float[batch, 4] x, bool c) => (float[batch, 4] y) {
      once = Constant <value = int64 {1}> ()
      yes = Constant <value = bool {1}> ()
      h = Loop (once, yes, x) <
        body = step (int64 i, bool going, float[batch, 4] state) => (bool going2, float[batch, 4] next) {
          going2 = Identity (going)
          next = If (c) <
            then_branch = one () => (float[batch, 4] a) { a = Exp (state) },
            else_branch = two () => (float[batch, 4] b) { b = Neg (state) }
          >
        }
      >
      y = Relu (h)
    }
    """
    feeds = [{"x": normal(2, 4), "c": np.array(c)} for c in (True, False)]
    small = simplified(onnx.parser.parse_model(text), tmp_path, *feeds)
    assert operators(small) == {"If": 1, "Exp": 1, "Neg": 1, "Relu": 1}


def test_a_loop_that_never_runs_gives_what_it_was_given(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    loops (float[batch, 4] x) => (float[batch, 4] y) {
      never = Constant <value = int64 {0}> ()
      h = Loop (never, , x) <
        body = step (int64 i, bool going, float[batch, 4] state) => (bool going, float[batch, 4] next) {
          next = Neg (state)
        }
      >
      y = Relu (h)
    }
    """
    small = simplified(onnx.parser.parse_model(text), tmp_path, {"x": normal(2, 4)})
    assert operators(small) == {"Relu": 1}


ASSUMED = """
<ir_version: 8, opset_import: ["" : 17]>
assumed (float[4, 4, n] x) => (float[4, 4] y) {
  one = Constant <value = int64[1] {1}> ()
  last = Constant <value = int64[1] {2}> ()
  shape = Shape (x)
  size = Gather (shape, last)
  single = Equal (size, one)
  h = If (single) <
    then_branch = yes () => (float[batch, 4] s) { s = Squeeze (x, last) },
    else_branch = no () => (float[batch, 4, n] i) { i = Identity (x) }
  >
  m = MatMul (h, w)
  y = Add (m, w)
}
"""


def test_a_branch_that_is_assumed_to_be_taken_is_told_in_the_file(tmp_path: Path) -> None:
    """With other sizes than 1 the original does not run either."""
    small = simplified(model_of(ASSUMED, {"w": (4, 4)}), tmp_path, {"x": normal(4, 4, 1)})
    assert operators(small) == {"Squeeze": 1, "MatMul": 1, "Add": 1, "Constant": 1}
    (notes,) = [entry.value for entry in small.metadata_props if entry.key == "regauge.notes"]
    assert "the first branch is taken to be the one that runs" in notes


def test_an_assumption_that_the_original_does_not_need_is_refused(tmp_path: Path) -> None:
    """With other sizes than 1 the original gives a result of three axes."""
    model = model_of(ASSUMED.replace("MatMul", "Add"), {"w": (4, 1)})
    assert runtime_outputs(model, {"x": normal(4, 4, 3)})[0].shape == (4, 4, 3)
    with pytest.raises(EmitError, match="does not run"):
        simplified(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_folded_twice_is_written(tmp_path: Path) -> None:
    """The convolution keeps its name, so that only its weights tell that it computes something else now."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    folds (float[batch, 6, 4] x) => (float[batch, 5, 6] y) {
      s = Mul (x, gain)
      t = Add (s, shift)
      p = Transpose <perm = [0, 2, 1]> (t)
      y = Conv <kernel_shape = [1]> (p, w, b)
    }
    """
    model = model_of(text, {"gain": (4,), "shift": (4,), "w": (5, 4, 1), "b": (5,)})
    small = simplified(model, tmp_path, {"x": normal(2, 6, 4)})
    assert operators(small) == {"Transpose": 1, "Conv": 1}
    assert [i.name for i in small.graph.initializer] == ["w", "b"]


def test_equal_constants_of_several_scopes_are_kept_once(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    shares (float[batch, 4] x, bool c) => (float[batch, 4] y, float[4] k) {
      k = Constant <value = float[4] {1.0, 2.0, 3.0, 4.0}> ()
      y = If (c) <
        then_branch = one () => (float[batch, 4] a) {
          w = Constant <value = float[4] {1.0, 2.0, 3.0, 4.0}> ()
          a = Add (x, w)
        },
        else_branch = two () => (float[batch, 4] b) <float[4] v = {1.0, 2.0, 3.0, 4.0}> { b = Mul (x, v) }
      >
    }
    """
    feeds = [{"x": normal(2, 4), "c": np.array(c)} for c in (True, False)]
    model = onnx.parser.parse_model(text)
    small = simplified(model, tmp_path, *feeds)
    assert operators(small) == {"If": 1, "Add": 1, "Mul": 1, "Constant": 1}  # ``k`` is an output, and stays its own
    assert [i.name for i in small.graph.initializer] == ["w"]
    kept = regauge.optimize(regauge.load(model), "simplify{skip=[ties]}").to_onnx(tmp_path / "kept.onnx")
    assert not onnx.load(kept).graph.initializer
