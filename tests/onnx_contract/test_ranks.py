"""Line 18 of the contract: sizes and ranks that follow from data, or from a dynamic size, are not taken for known."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_simplified import assert_equal_runs, canonical, normal, operators, parsed, simplified

HEADER = '<ir_version: 8, opset_import: ["" : 17]> ranks '
FLATTEN = "g = Shape (h)  d = Gather <axis = 0> (g, zero)  t = Concat <axis = 0> (d, rest)  y = Reshape (h, t)"
TABLES = {"zero": np.array([0]), "rest": np.array([-1]), "column": np.array([-1, 1]), "one": np.float32(1)}
Feeds = dict[str, np.ndarray]


def feeds(x: tuple[int, ...], *axes: int) -> Feeds:
    return {"x": normal(*x), "s": np.array(axes)}


UNKNOWN: dict[str, tuple[str, list[Feeds]]] = {
    "reshape by an input": (
        f"(float[2, 6] x, int64[k] s) => (float y) {{ h = Reshape (x, s)  {FLATTEN} }}",
        [feeds((2, 6), 3, 4), feeds((2, 6), 12), feeds((2, 6), 1, 2, 6)],
    ),
    "reduction over an input": (
        "(float[2, 3, 3] x, int64[k] s) => (float y) "
        "{ h = ReduceSum <keepdims = 0> (x, s)  g = Shape (h)  e = Expand (one, g)  y = Add (h, e) }",
        [feeds((2, 3, 3), 0, 1), feeds((2, 3, 3), 2)],
    ),
    "new axes by an input": (
        f"(float[2, 3] x, int64[1] s) => (float y) {{ h = Unsqueeze (x, s)  {FLATTEN} }}",
        [feeds((2, 3), 0), feeds((2, 3), 1)],
    ),
    "squeezed by an input": (
        "(float[1, 4, 1] x, int64[k] s) => (float y) { h = Squeeze (x, s)  y = Reshape (h, column) }",
        [feeds((1, 4, 1), 0, 2), feeds((1, 4, 1), 0)],
    ),
    "squeezed where a dynamic size is one": (
        "(float[n, 3, 3] x) => (int64[k] y) { h = Squeeze (x)  r = Relu (h)  y = Shape (r) }",
        [feeds((1, 3, 3)), feeds((2, 3, 3))],
    ),
    "filled by an input": (
        "(int64[k] s) => (float y) { h = ConstantOfShape (s)  r = Relu (h)  y = Relu (r) }",
        [feeds((), 2, 3), feeds((), 4)],
    ),
    "new axes in a branch": (
        "(float[2, 3] x, int64[1] s, bool c) => (float y) { y = If (c) <"
        f"then_branch = a () => (float y) {{ h = Unsqueeze (x, s)  {FLATTEN} }},"
        "else_branch = b () => (float n) { n = Neg (x) } > }",
        [{**feeds((2, 3), axis), "c": np.array(c)} for axis in (0, 1) for c in (True, False)],
    ),
}  # fmt: skip


def unranked(text: str) -> onnx.ModelProto:
    """A model whose output ``float y`` says nothing of its rank."""
    model = parsed(HEADER + text, **{name: array for name, array in TABLES.items() if name in text})
    for value in model.graph.output:
        if not value.type.tensor_type.shape.dim:
            value.type.tensor_type.ClearField("shape")
    return model


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_follows_from_an_unknown_rank_stays_to_the_byte(case: str, tmp_path: Path) -> None:
    text, given = UNKNOWN[case]
    model = unranked(text)
    small = simplified(model, tmp_path)
    assert [canonical(node) for node in small.graph.node] == [canonical(node) for node in model.graph.node]
    assert_equal_runs(model, small, *given)


def test_a_declared_rank_is_a_fact(tmp_path: Path) -> None:
    """Of what the file calls a matrix the axes are reversed and reversed back."""
    text = """(float[2, 6] x, int64[k] s) => (float[a, b] y) <float[a, b] h> {
      h = Reshape (x, s)  t = Transpose <perm = [1, 0]> (h)  u = Transpose <perm = [1, 0]> (t)  y = Relu (u)
    }"""
    model = parsed(HEADER + text)
    small = simplified(model, tmp_path)
    assert operators(small) == {"Reshape": 1, "Relu": 1}
    assert_equal_runs(model, small, feeds((2, 6), 3, 4))


def test_sizes_of_two_nodes_that_follow_from_data_are_two(tmp_path: Path) -> None:
    """ONNX's inference on one node at a time calls the first size that it does not know ``unk__0`` each time."""
    text = """(float[2, 3] x, int64[4] p, int64[4] q) => (float[a, b] y) {
      h = Pad (x, p)  k = Pad (x, q)  r = ReduceSum (h)
      g = Shape (k)  rows = Gather (g, zero)  t = Concat <axis = 0> (rows, rest)
      u = Reshape (h, t)  s = Add (u, r)  y = Relu (s)
    }"""
    model = parsed(HEADER + text, zero=np.array([0]), rest=np.array([-1]))
    small = simplified(model, tmp_path)
    assert_equal_runs(model, small, *(
        {"x": normal(2, 3), "p": np.array([2, 0, 0, 0]), "q": np.array([rows, 0, 0, 0])} for rows in (2, 4)
    ))  # fmt: skip


def test_a_size_may_be_all_that_is_wanted_of_a_result(tmp_path: Path) -> None:
    model = parsed(HEADER + "(float[2, 3] x, int64[4] s) => (int64[2] y) { h = Pad (x, s)  y = Shape (h) }")
    small = simplified(model, tmp_path)
    assert operators(small) == {"Pad": 1, "Shape": 1}
    assert_equal_runs(model, small, feeds((2, 3), 1, 0, 0, 2))
