"""Heads of one sequence have positions first before a product, whose runtime then permutes nothing; else they stay."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_simplified import assert_equal_runs, normal, parsed, simplified
from regauge.backends.run_onnxruntime import optimised_file

ATTENTION = """<ir_version: 8, opset_import: ["" : 17]>
net (float[BATCH, LENGTH, 20] x) => (float[a, b, c, d] y RESULTS) {
  q = MatMul (x, wq)
  q4 = Reshape (q, heads)
  qt = Transpose <perm = [0, 2, 1, 3]> (q4)
  k = MatMul (x, wk)
  k4 = Reshape (k, heads)
  kt = Transpose <perm = [0, 2, 3, 1]> (k4)
  v = MatMul (x, wv)
  v4 = Reshape (v, heads)
  vt = Transpose <perm = [0, 2, 1, 3]> (v4)
  BETWEEN
  s = MatMul (qr, kt)
  p = Softmax <axis = -1> (s)
  y = MatMul (p, vt)
}
"""
PLAIN = "qr = Mul (qt, scale)"
ROTARY = """
  q1, q2 = Split <axis = 3> (qt)
  n = Neg (q2)
  turned = Concat <axis = 3> (n, q1)
  qs = Mul (turned, sine)
  qc = Mul (qt, cosine)
  r = Add (qs, qc)
  qr = Mul (r, scale)
"""
PER_HEAD = "qr = Mul (qt, gains)"
SUMMED = """
  sum = ReduceSum <keepdims = 1> (qt, along)
  qr = Sub (qt, sum)
"""
WIDTH, LENGTH = 20, 8


def model(batch: str = "1", length: str = "8", between: str = PLAIN, results: str = "") -> onnx.ModelProto:
    text = ATTENTION.replace("BETWEEN", between).replace("RESULTS", results)
    text = text.replace("BATCH", batch).replace("LENGTH", length)
    heads = np.array([0, 0, 2, 10] if length != "8" else [0, 8, 2, 10], dtype=np.int64)
    extra = {"scale": np.float32(0.2)}
    if between is ROTARY:
        extra |= {"sine": normal(1, 1, LENGTH, 10), "cosine": normal(LENGTH, 10)}
    if between is PER_HEAD:
        extra["gains"] = normal(2, 1, 10)
    if between is SUMMED:
        extra["along"] = np.array([1], dtype=np.int64)
    return parsed(
        text,
        wq=normal(WIDTH, 20) / 5,
        wk=normal(WIDTH, 20)[:, ::-1] / 5,
        wv=normal(WIDTH, 20) + 1,
        heads=heads,
        **extra,
    )


def permutes(path: Path) -> list[list[int]]:
    """The orders of permutes that are left in a file."""
    nodes = onnx.load(path).graph.node
    return [list(node.attribute[0].ints) for node in nodes if node.op_type == "Transpose"]


ALONE = "simplify{skip=projections}"


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, 0),
        ({"between": ROTARY}, 0),
        ({"between": PER_HEAD}, 0),
        ({"length": "n"}, 0),
        ({"batch": "2"}, 3),
        ({"batch": "b"}, 3),
        ({"between": SUMMED}, 1),
        ({"results": ", float[e, f, g, h] qt"}, 1),
    ],
    ids=["plain", "rotary", "gains", "length-open", "two", "batch-open", "sum-over-heads", "read-elsewhere"],
)
def test_a_runtime_permutes_no_heads_of_one_sequence(tmp_path: Path, options: dict[str, str], left: int) -> None:
    source = model(**options)
    small = simplified(source, tmp_path, ALONE)
    optimised_file(tmp_path / "small.onnx", tmp_path / "fused.onnx")
    assert len(permutes(tmp_path / "fused.onnx")) == left
    assert sum(order[0] == 0 for order in permutes(tmp_path / "small.onnx")) == left
    batch = 1 if options.get("batch", "1") == "1" else 2
    assert_equal_runs(source, small, {"x": np.random.default_rng(0).standard_normal((batch, 8, 20)).astype(np.float32)})


def test_parts_of_one_projection_are_told_apart_before_they_are_permuted(tmp_path: Path) -> None:
    """The three projections of a short sequence are one, whose heads are split: then they are split first."""
    source = model()
    small = simplified(source, tmp_path)
    assert [node.op_type for node in small.graph.node].count("MatMul") == 3
    optimised_file(tmp_path / "small.onnx", tmp_path / "fused.onnx")
    assert not permutes(tmp_path / "fused.onnx")
    assert_equal_runs(source, small, {"x": np.random.default_rng(0).standard_normal((1, 8, 20)).astype(np.float32)})


def test_what_lies_with_positions_first_stays(tmp_path: Path) -> None:
    once = simplified(model(between=ROTARY), tmp_path, ALONE)
    again = simplified(once, tmp_path, ALONE)
    assert [node.op_type for node in again.graph.node] == [node.op_type for node in once.graph.node]
    assert permutes(tmp_path / "small.onnx") == [[1, 2, 0, 3], [1, 2, 3, 0], [1, 2, 0, 3]]


FUSED = """<ir_version: 8, opset_import: ["" : 17]>
net (float[1, 640, 12] x) => (float[1, 2, 640, 6] y) {
  whole = MatMul (x, weight)
  parts = Reshape (whole, shape)
  turned = Transpose <perm = [2, 0, 3, 1, 4]> (parts)
  q1, k1, v1 = Split <axis = 0> (turned)
  q = Squeeze (q1, first)
  v = Squeeze (v1, first)
  k = Squeeze (k1, both)
  k3 = Transpose <perm = [0, 2, 1]> (k)
  kt = Unsqueeze (k3, first)
  s = MatMul (q, kt)
  p = Softmax <axis = -1> (s)
  y = MatMul (p, v)
}
"""


def test_a_fused_projection_of_one_sequence_is_neither_split_nor_permuted(tmp_path: Path) -> None:
    """Of the keys the axis of the batch goes, too, before they are turned."""
    shape, first, both = (np.array(numbers, dtype=np.int64) for numbers in ([1, 640, 3, 2, 6], [0], [0, 1]))
    source = parsed(FUSED, weight=normal(12, 36) / 5, shape=shape, first=first, both=both)
    small = simplified(source, tmp_path)
    kinds = [node.op_type for node in small.graph.node]
    assert kinds.count("MatMul") + kinds.count("Gemm") == 5 and "Split" not in kinds and "Squeeze" not in kinds
    optimised_file(tmp_path / "small.onnx", tmp_path / "fused.onnx")
    assert not permutes(tmp_path / "fused.onnx")
    assert_equal_runs(source, small, {"x": np.random.default_rng(0).standard_normal((1, 640, 12)).astype(np.float32)})
