"""A Gemm is several nodes here: what a rule leaves of it is one Gemm again, and never the old one with new weights."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest

import regauge
from onnx_models import model_of
from onnx_simplified import assert_equal_runs, normal, operators, parsed, props, simplified

BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[3, 5] x, bool k) => (float[3, 4] y) {
  y = If (k) <
    then_branch = one () => (float[3, 4] t) { t = Gemm (x, a, c) },
    else_branch = other () => (float[3, 4] e) { e = Gemm <alpha = 0.5> (x, b, d) }
  >
}
"""


def gemm(options: str, operands: str, opset: int, **weights: np.ndarray) -> onnx.ModelProto:
    """One Gemm; what is no weight of its operands is an input."""
    shapes = {"x": "3, 5", "xt": "5, 3", "c": "4", "cc": "3, 4"}
    inputs = ", ".join(f"float[{shapes[n]}] {n}" for n in operands.split(", ") if n not in weights)
    text = f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    net ({inputs}) => (float[3, 4] y) {{ y = Gemm <{options}> ({operands}) }}
    """
    return parsed(text, **weights)


FORMS = itertools.product(("x", "xt"), ("w", "wt"), ("", "c", "cc"), (True, False), (1, 0.5), (1, 2), (9, 13))


@pytest.mark.parametrize(
    ("x", "w", "c", "stored", "alpha", "beta", "opset"),
    [form for form in FORMS if form[2] or form[-1] >= 11],  # before opset 11 a Gemm has three operands
)
def test_a_gemm_stays_one_node(
    x: str, w: str, c: str, stored: bool, alpha: float, beta: float, opset: int, tmp_path: Path
) -> None:
    options = f"transA = {int(x == 'xt')}, transB = {int(w == 'wt')}, alpha = {float(alpha)}, beta = {float(beta)}"
    weights = {w: normal(5, 4) if w == "w" else normal(4, 5)}
    shapes = {"x": (3, 5), "xt": (5, 3), "c": (4,), "cc": (3, 4)}
    if c and stored:
        weights[c] = normal(*shapes[c])
    model = gemm(options, ", ".join(filter(None, (x, w, c))), opset, **weights)
    small = simplified(model, tmp_path)
    assert operators(small) == {"Gemm": 1} or (not c and operators(small) == {"MatMul": 1})
    assert_equal_runs(model, small, {value.name: normal(*shapes[value.name]) for value in model.graph.input})


def test_a_scale_inside_a_gemm_in_a_branch_is_not_applied_twice(tmp_path: Path) -> None:
    """The check of the written file takes one branch only."""
    weights = {"a": normal(5, 4), "b": normal(5, 4), "c": normal(4), "d": normal(4)}
    model = parsed(BRANCHES, **weights)
    small = simplified(model, tmp_path)
    assert_equal_runs(model, small, *({"x": normal(3, 5), "k": np.array(k)} for k in (True, False)))


def test_a_matmul_and_its_addition_stay_what_they_are(tmp_path: Path) -> None:
    """Only what a Gemm left is joined."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[3, 5] x, float[4] c) => (float[3, 4] y) { h = MatMul (x, w)  s = Mul (h, two)  y = Add (s, c) }
    """
    model = parsed(text, w=normal(5, 4), two=np.float32(2))
    assert operators(simplified(model, tmp_path)) == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize("options", ["beta = 0.0, transB = 1", "alpha = 0.5, beta = 0.0, transA = 1"])
def test_an_operand_that_a_gemm_does_not_use_is_not_cut(options: str, tmp_path: Path) -> None:
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[4, 4] x) => (float[4, 4] y) {{ y = Gemm <{options}> (x, w, c) }}
    """
    model = model_of(text, {"w": (4, 4), "c": (1, 4)})
    graph = regauge.load(model)
    assert "c" not in graph.parameters
    small = onnx.load(regauge.optimize(graph, "prune{ratio=0.5}").to_onnx(tmp_path / "small.onnx"))
    assert_equal_runs(model, small, {"x": normal(4, 4)})


def test_a_node_that_is_spelled_anew_keeps_what_people_wrote_on_it(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 17]>
    net (float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y) {
      h = Conv (x, k)  y = BatchNormalization (h, gain, bias, mean, var)
    }
    """
    vectors = {"gain": normal(4), "bias": normal(4), "mean": normal(4), "var": np.abs(normal(4)) + 1}
    model = parsed(text, k=normal(4, 3, 1, 1), **vectors)
    conv = model.graph.node[0]
    conv.name, conv.doc_string = "first", "the first one"
    conv.metadata_props.add(key="owner", value="me")
    (node,) = simplified(model, tmp_path).graph.node
    assert (node.op_type, node.name, node.doc_string) == ("Conv", "first", "the first one")
    assert props(node)["owner"] == "me" and props(node)["regauge.added_by"] == "batch-norm-into-weights"
