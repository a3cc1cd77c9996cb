"""Lines 9, 10, 11, 13 and 23 of the contract under ``simplify``: scopes, functions, foreign and random operators."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

import regauge
from onnx_simplified import assert_equal_runs, canonical, graphs, normal, operators, parsed, props, simplified
from regauge.backends.run_onnxruntime import Session

CAPTURES = """
<ir_version: 8, opset_import: ["" : 17]>
captures (float[n, 4] x, bool c) => (float[n, 4] y) {
  only_inside = Exp (x)
  same = Identity (only_inside)
  dead = Neg (x)
  y = If (c) <
    then_branch = yes () => (float[n, 4] a) { t = Transpose <perm = [1, 0]> (same) a = Transpose <perm = [1, 0]> (t) },
    else_branch = no () => (float[n, 4] b) { b = Mul (x, w) }
  >
}
"""


def test_what_a_branch_reads_from_around_it_is_read(tmp_path: Path) -> None:
    """``only_inside`` has no other reader; a result of a branch must be a value of that branch, so its nodes stay."""
    model = parsed(CAPTURES, w=normal(4))
    small = simplified(model, tmp_path)
    assert operators(small) == {"Exp": 1, "If": 1, "Transpose": 2, "Mul": 1}
    assert [i.name for i in small.graph.initializer] == ["w"]
    assert_equal_runs(model, small, *({"x": normal(n, 4), "c": np.array(c)} for n in (1, 3) for c in (True, False)))


NO_LONGER_CAPTURED = """
<ir_version: 8, opset_import: ["" : 17]>
captures (float[2, 3] x, bool c) => (float[2, 3] y) {
  y = If (c) <
    then_branch = yes () => (float[2, 3] a) { dead = Sub (w, x)  a = Neg (x) },
    else_branch = no () => (float[2, 3] b) { s = Concat <axis = 0> (x, v)  k = Slice (s, zero, two, zero)  b = Abs (k) }
  >
}
"""


def test_branches_may_stop_reading_what_is_around_them(tmp_path: Path) -> None:
    """``w`` is read by a dead node alone, ``v`` by one that is cut out again."""
    model = parsed(NO_LONGER_CAPTURED, w=normal(3), v=normal(4, 3), zero=np.array([0]), two=np.array([2]))
    small = simplified(model, tmp_path)
    assert operators(small)["If"] == 1 and not {"Sub", "Concat"} & operators(small).keys()
    assert not small.graph.initializer
    assert_equal_runs(model, small, *({"x": normal(2, 3), "c": np.array(c)} for c in (True, False)))


LOOPS = """
<ir_version: 8, opset_import: ["" : 17]>
loops (float[n, 4] x, int64 m) => (float[n, 4] y, float[k, n, 4] all) {
  scale = Identity (w)
  y, all = Loop (m, , x) <
    body = step (int64 i, bool going, float[n, 4] h) => (bool going_out, float[n, 4] h_out, float[n, 4] row) {
      going_out = Identity (going)
      s = Mul (h, scale)
      p = Transpose <perm = [1, 0]> (s)
      h_out = Transpose <perm = [1, 0]> (p)
      row = Identity (h_out)
    }
  >
}
"""


def test_the_interface_of_a_loop_body_is_positional(tmp_path: Path) -> None:
    model = parsed(LOOPS, w=normal(4))
    small = simplified(model, tmp_path)
    (loop,) = [node for node in small.graph.node if node.op_type == "Loop"]
    body, before = loop.attribute[0].g, next(n for n in model.graph.node if n.op_type == "Loop").attribute[0].g
    assert [v.name for v in body.input] == [v.name for v in before.input]
    assert [v.name for v in body.output] == [v.name for v in before.output]
    assert "Transpose" not in operators(small)
    assert_equal_runs(model, small, *({"x": normal(n, 4), "m": np.array(m)} for n in (1, 3) for m in (1, 4)))


SCANS = """
<ir_version: 8, opset_import: ["" : 17]>
scans (float[4] start, float[time, 4] x) => (float[4] end, float[time, 4] sums) {
  end, sums = Scan <num_scan_inputs = 1> (start, x) <
    body = step (float[4] h, float[4] row) => (float[4] h_out, float[4] out) {
      n = Neg (row)
      nn = Neg (n)
      a = Add (h, nn)
      h_out = Mul (a, w)
      out = Identity (h_out)
    }
  >
}
"""


def test_bodies_of_scans_are_simplified(tmp_path: Path) -> None:
    text = SCANS.replace("<num_scan_inputs = 1> (start, x) <", "(start, x) <num_scan_inputs = 1,")
    model = parsed(text, w=normal(4))
    small = simplified(model, tmp_path)
    assert "Neg" not in operators(small) and operators(small)["Scan"] == 1
    assert_equal_runs(model, small, *({"start": normal(4), "x": normal(time, 4)} for time in (1, 3)))


FUNCTIONS = """
<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
calls (float[n, 4] x) => (float[n, 4] y) {
  i = Identity (x)
  h = local.leaky <slope = 0.5> (i)
  g = local.leaky <slope = 0.25> (h)
  y = Neg (g)
}
<domain: "local", opset_import: ["" : 17]>
leaky <slope> (a) => (b) {
  s = Identity (a)
  b = LeakyRelu <alpha : float = @slope> (s)
}
"""


def test_functions_with_attribute_parameters_are_kept(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(FUNCTIONS)
    small = simplified(model, tmp_path)
    assert [canonical(function) for function in small.functions] == [canonical(f) for f in model.functions]
    calls = [node for node in small.graph.node if node.domain == "local"]
    assert [node.attribute[0].f for node in calls] == [0.5, 0.25] and operators(small)["Identity"] == 0
    assert_equal_runs(model, small, *({"x": normal(n, 4)} for n in (1, 3)))


CUSTOM = """
<ir_version: 8, opset_import: ["" : 17, "acme" : 3]>
custom (float[n, 4] x) => (float[n, 4] y) {
  i = Identity (x)
  t = Transpose <perm = [1, 0]> (i)
  b = Transpose <perm = [1, 0]> (t)
  a = Exp (b)
  [mine] h = acme.Mystery <knob = 3, name = "k"> (a, w)
  [yours] g = acme.Mystery <knob = 3, name = "k"> (a, w)
  y = Add (h, g)
}
"""


def test_custom_operators_are_barriers(tmp_path: Path) -> None:
    """Two equal ones stay two, and one warning tells of both; around them is simplified."""
    model = parsed(CUSTOM, w=normal(4, 4))
    with pytest.warns(regauge.RegaugeWarning) as seen:
        graph = regauge.load(model)
    assert [str(w.message).count("Mystery (2)") for w in seen] == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = onnx.load(regauge.optimize(graph, "simplify").to_onnx(tmp_path / "small.onnx"))
    assert operators(small) == {"Exp": 1, "Mystery": 2, "Add": 1}
    before = {node.name: canonical(node) for node in model.graph.node if node.domain == "acme"}
    assert {node.name: canonical(node) for node in small.graph.node if node.domain == "acme"} == before
    assert {o.domain: o.version for o in small.opset_import} == {"": 17, "acme": 3}


STATEFUL = """
<ir_version: 8, opset_import: ["" : 17, "ai.onnx.preview.training" : 1]>
random (float[n, 4] x) => (float[n, 4] y, float[2, 4] z, float[n, 4] d) {
  shape = Constant <value = int64[2] {2, 4}> ()
  a = RandomNormal <shape = [2, 4]> ()
  b = RandomNormal <shape = [2, 4]> ()
  z = Sub (a, b)
  c = RandomUniformLike (x)
  e = RandomUniformLike (x)
  f = Bernoulli (x)
  s = Add (c, e)
  t = Add (s, f)
  y = Identity (t)
  ratio = Constant <value_float = 0.5> ()
  training = Constant <value = bool {1}> ()
  d1 = Dropout (x, ratio, training)
  d2 = Dropout (x, ratio, training)
  d = Sub (d1, d2)
}
"""


def test_random_nodes_are_never_merged_nor_folded(tmp_path: Path) -> None:
    model = parsed(STATEFUL)
    small = simplified(model, tmp_path)
    kinds = ("RandomNormal", "RandomUniformLike", "Bernoulli", "Dropout", "Sub")
    assert {kind: operators(small)[kind] for kind in kinds} == dict(zip(kinds, (2, 2, 1, 2, 2), strict=True))
    _, z, _ = Session(small, optimisation="off").run({"x": np.full((2, 4), 0.5, np.float32)})
    assert z.abs().min() > 0


def test_a_batch_norm_in_training_mode_is_not_folded(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    trains (float[n, 3, 4, 4] x) => (float[n, 4, 4, 4] y, float[4] running) {
      h = Conv <pads = [1, 1, 1, 1]> (x, k)
      i = Identity (h)
      y, running, spread = BatchNormalization <training_mode = 1> (i, gain, shift, mean, var)
    }
    """
    weights = {"gain": normal(4), "shift": normal(4), "mean": normal(4), "var": np.abs(normal(4)) + 1}
    model = parsed(text, k=normal(4, 3, 3, 3), **weights)
    small = simplified(model, tmp_path)
    assert operators(small) == {"Conv": 1, "BatchNormalization": 1}
    assert_equal_runs(model, small, {"x": normal(3, 3, 4, 4)})


def test_new_nodes_say_what_they_replace_where_the_file_can(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    says (float[n, 2, 3, 4] x) => (float[n, 4, 3, 2] y) {
      a = Transpose <perm = [0, 2, 1, 3]> (x)
      r = Relu (a)
      b = Transpose <perm = [0, 3, 1, 2]> (r)
      y = Abs (b)
    }
    """
    model = onnx.parser.parse_model(text)
    small = simplified(model, tmp_path)
    (new,) = [node for node in small.graph.node if node.op_type == "Transpose"]
    found = props(new)
    assert found["regauge.added_by"] in {rule for rule, _ in _rules()}
    assert set(found["regauge.replaces"].split(", ")) <= {"a", "r", "b"} and found["regauge.replaces"]
    assert props(small)["regauge.passes"] == "simplify"
    model.ir_version = 8
    assert not any(node.metadata_props for node in simplified(model, tmp_path).graph.node)


def _rules() -> list[tuple[str, str]]:
    from regauge.passes.catalog import find_pass

    return [(name.rpartition("/")[2], text) for name, text in find_pass("simplify").details()]


def test_names_in_branches_do_not_shadow_what_moves_out(tmp_path: Path) -> None:
    small = simplified(parsed(CAPTURES, w=normal(4)), tmp_path)
    names = [name for graph in graphs(small.graph) for node in graph.node for name in node.output]
    assert len(names) == len(set(names))
