"""What ``simplify`` folds in the file itself: known sizes and constants, nodes that do nothing, dead nodes."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import regauge
from onnx_models import ATTENTION, ATTENTION_WEIGHTS, model_of, save
from regauge.backends.onnx_model.carrier import Carrier
from regauge.backends.onnx_model.sharing import share_equal
from regauge.ir.storage.weights import sampled_bytes


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node if node.op_type != "Constant")


def outputs(path: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def simplified(text: str, weights: dict[str, tuple[int, ...]], folder: Path) -> tuple[Path, Path]:
    source = save(model_of(text, weights), folder / "source.onnx")
    target = folder / "simple.onnx"
    regauge.optimize(regauge.load(source), "simplify").to_onnx(target)
    return source, target


def test_sizes_that_reshapes_can_take_from_their_operand_are_not_computed(tmp_path: Path) -> None:
    """Nodes of the attention fixture: 3 + 2 MatMuls each way, 4 reshapes, 4 transposes, scale and softmax."""
    source, target = simplified(ATTENTION, ATTENTION_WEIGHTS, tmp_path)
    left = operators(target)
    assert not {"Shape", "Gather", "Concat", "Cast", "Sqrt"} & set(left)
    assert left["Reshape"] == 4 and left["MatMul"] == 6
    for batch, time in ((2, 5), (1, 1)):
        x = np.random.default_rng(0).standard_normal((batch, time, 12)).astype(np.float32)
        for a, b in zip(outputs(source, x=x), outputs(target, x=x), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


TYPE_ONLY = """
<ir_version: 8, opset_import: ["" : 18]>
typed (float[2, 3, 8, 8] x) => (float[2, 4, 6, 6] y) {
  zero = Constant <value = float {0.0}> ()
  like = CastLike (zero, x)
  four = Constant <value = int64[1] {4}> ()
  bias = Expand (like, four)
  y = Conv (x, w, bias)
}
"""


def test_a_bias_that_depends_on_the_type_of_the_input_only_is_a_constant(tmp_path: Path) -> None:
    _, target = simplified(TYPE_ONLY, {"w": (4, 3, 3, 3)}, tmp_path)
    assert operators(target) == {"Conv": 1}


IDLE = """
<ir_version: 8, opset_import: ["" : 17]>
idle (float[batch, 4] x) => (float[batch, 4] y) {
  a = Identity (x)
  b = Dropout (a)
  c = Cast <to = 1> (b)
  dead = Exp (c)
  deader = Relu (dead)
  y = MatMul (c, w)
}
"""


def test_what_does_nothing_and_what_nobody_reads_goes(tmp_path: Path) -> None:
    _, target = simplified(IDLE, {"w": (4, 4)}, tmp_path)
    assert operators(target) == {"MatMul": 1}


NESTED = """
<ir_version: 8, opset_import: ["" : 17]>
nested (float[batch, 4] x, bool c) => (float[batch, 4] y) {
  one = Constant <value = int64[1] {1}> ()
  s = Shape (x)
  y = If (c) <
    then_branch = yes () => (float[batch, 4] a) {
      i = Identity (x)
      t = Reshape (i, s)
      a = MatMul (t, w)
    },
    else_branch = no () => (float[batch, 4] b) {
      b = Relu (x)
    }
  >
}
"""


def test_branches_are_folded_too(tmp_path: Path) -> None:
    source, target = simplified(NESTED, {"w": (4, 4)}, tmp_path)
    (node,) = [node for node in onnx.load(target).graph.node if node.op_type == "If"]
    assert [[inner.op_type for inner in a.g.node] for a in node.attribute] == [["MatMul"], ["Relu"]]
    x = np.ones((3, 4), np.float32)
    for c in (True, False):
        for a, b in zip(outputs(source, x=x, c=np.array(c)), outputs(target, x=x, c=np.array(c)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


FUNCTION = """
<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
calls (float[n, 4] x) => (float[n, 4] y) { y = local.idle (x) }
<domain: "local", opset_import: ["" : 17]>
idle (a) => (b) { i = Identity (a)  b = Add (i, i) }
"""


def test_functions_stay_as_they_are(tmp_path: Path) -> None:
    before, after = (onnx.load(path).functions[0] for path in simplified(FUNCTION, {}, tmp_path))
    assert [node.op_type for node in after.node] == [node.op_type for node in before.node] == ["Identity", "Add"]


def test_arithmetic_on_scalars_of_real_numbers_is_folded(tmp_path: Path) -> None:
    """numpy gives numbers, not arrays, for these."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    scalars (float[n] x) => (float[n] y) {
      a = Constant <value_float = 3.0> ()
      b = Constant <value_float = 2.0> ()
      c = Div (a, b)
      y = Mul (x, c)
    }
    """
    _, target = simplified(text, {}, tmp_path)
    assert operators(target) == {"Mul": 1}


def test_sizes_are_computed_once(tmp_path: Path) -> None:
    """Two expansions to the same dynamic sizes read one vector."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    sizes (float[n, m] x) => (float[n, m] y, float[n, m] z) {
      s = Shape (x)
      t = Shape (x)
      zero = Constant <value = int64[1] {0}> ()
      one = Constant <value = int64[1] {1}> ()
      a = Gather (s, zero)
      b = Gather (s, one)
      c = Gather (t, zero)
      d = Gather (t, one)
      ab = Concat <axis = 0> (a, b)
      cd = Concat <axis = 0> (c, d)
      y = Expand (v, ab)
      z = Expand (w, cd)
    }
    """
    _, target = simplified(text, {"v": (1, 1), "w": (1, 1)}, tmp_path)
    left = operators(target)
    assert left["Expand"] == 2 and left.total() - 2 <= 4


BOMB = """
<ir_version: 8, opset_import: ["" : 17]>
bomb (float[4] x) => (float[64, 128, 4] y) {
  shape = Constant <value = int64[3] {64, 128, 1}> ()
  ones = ConstantOfShape (shape)
  y = Add (x, ones)
}
"""


def test_no_file_grows_by_folding(tmp_path: Path) -> None:
    """The filled tensor would take 32 KiB, more than a percent of the file and of what any file may grow by."""
    source, target = simplified(BOMB, {}, tmp_path)
    assert operators(target)["ConstantOfShape"] == 1
    assert target.stat().st_size <= source.stat().st_size + 256  # the notes on what was done


@pytest.mark.parametrize("text", [ATTENTION, TYPE_ONLY, IDLE])
def test_a_second_run_changes_nothing(text: str, tmp_path: Path) -> None:
    weights = {ATTENTION: ATTENTION_WEIGHTS, TYPE_ONLY: {"w": (4, 3, 3, 3)}, IDLE: {"w": (4, 4)}}[text]
    _, once = simplified(text, weights, tmp_path)
    regauge.optimize(regauge.load(once), "simplify").to_onnx(tmp_path / "twice.onnx")
    assert onnx.load(tmp_path / "twice.onnx").graph == onnx.load(once).graph


def test_large_constants_that_differ_in_one_entry_stay_two(tmp_path: Path) -> None:
    """Before all of their bytes are compared, a few are, and the ninth entry is not among those."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    t (float[2, 64] x) => (float[2, 64] y) { p = MatMul (x, a) q = MatMul (x, b) r = MatMul (x, c) y = Sum (p, q, r) }
    """
    model = model_of(text, dict.fromkeys("abc", (64, 64)))
    first, second, third = model.graph.initializer
    array = numpy_helper.to_array(first).copy()
    second.raw_data = array.tobytes()
    array[0, 9] += 1
    third.raw_data = array.tobytes()
    one, other = (sampled_bytes(a.view(np.uint8).reshape(-1)) for a in (array, numpy_helper.to_array(first)))
    assert one == other
    graph = regauge.load(save(model, tmp_path / "m.onnx"))
    carrier = Carrier(graph.metadata["onnx"])
    share_equal(carrier)
    assert list(carrier.model.graph.initializers) == ["a", "c"]
