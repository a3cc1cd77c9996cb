"""A bias before a residual sum goes into the norm that gives the residual, where all else that reads that takes it."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import regauge
from onnx_simplified import assert_equal_runs, normal, parsed, simplified

BLOCK = """<ir_version: 8, opset_import: ["" : 17]>
net (float[ROWS, 12] x) => (float[a, b] y RESULTS) {
  z = LayerNormalization <axis = -1> (x, gain, shift)
  UP
  h = Relu (u)
  DOWN
  s = Add (SUMMANDS)
  y = LayerNormalization <axis = -1> (s, gain, LAST)
}
"""
GEMMS = {"UP": "u = Gemm (z, w1, b1)", "DOWN": "d = Gemm (h, w2, b2)"}
PRODUCTS = {"UP": "m = MatMul (z, w1)  u = Add (b1, m)", "DOWN": "n = MatMul (h, w2)  d = Add (n, b2)"}
TURNED = {"UP": "u = Gemm <transB = 1> (z, w1, b1)", "DOWN": "d = Gemm <transB = 1> (h, w2, b2)"}
PARTS = {**GEMMS, "ROWS": "n", "RESULTS": "", "SUMMANDS": "d, z", "LAST": "last"}
DOUBLED = {"UP": "e = Gemm (z, w1, b1)  g = Gemm (z, w3, b3)  u = Mul (e, g)"}


def model(**parts: str) -> onnx.ModelProto:
    text = BLOCK
    for name, part in {**PARTS, **parts}.items():
        text = text.replace(name, part)
    up, down = normal(12, 20), normal(20, 12)
    if "transB" in text:
        up, down = up.T.copy(), down.T.copy()
    vectors = {"gain": normal(12), "shift": normal(12), "last": normal(12)[::-1], "b1": normal(20), "b2": normal(12)}
    second = {"w3": normal(12, 20)[::-1], "b3": normal(20)} if "w3" in text else {}
    vectors = {name: vector for name, vector in vectors.items() if name in text}
    return parsed(text, w1=up / 4, w2=down / 4, **vectors, **second)


@pytest.mark.parametrize(
    ("parts", "sums"),
    [
        ({}, 0),
        ({"SUMMANDS": "z, d"}, 0),
        (PRODUCTS, 2),
        (TURNED, 0),
        (DOUBLED, 0),
        ({"ROWS": "5"}, 0),
        ({"LAST": "shift"}, 1),
        ({"RESULTS": ", float[c, e] z"}, 1),
        ({"UP": "t = Tanh (z)  u = Gemm (t, w1, b1)"}, 1),
        ({"UP": "u = Gemm (z, w1)"}, 1),
        ({"DOWN": "d = Gemm (h, w2)"}, 1),
        ({"RESULTS": ", float[c, e] d"}, 1),
        ({"SUMMANDS": "d, x"}, 1),
    ],
    ids=[
        "plain", "turned", "products", "transposed", "gated", "rows-known", "shift-shared", "residual-given",
        "read-elsewhere", "no-bias-to-correct", "no-bias", "sum-given", "no-norm",
    ],
)  # fmt: skip
def test_a_residual_takes_the_place_of_a_bias(tmp_path: Path, parts: dict[str, str], sums: int) -> None:
    source = model(**parts)
    small = simplified(source, tmp_path)
    assert [node.op_type for node in small.graph.node].count("Add") == sums
    if not sums:
        down = next(node for node in small.graph.node if node.output[0] == "s")
        assert down.op_type == "Gemm" and down.input[2] == "z"
    assert_equal_runs(source, small, {"x": np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)})


def test_a_bias_that_rounds_what_it_is_added_to_stays(tmp_path: Path) -> None:
    source = model()
    (bias,) = (tensor for tensor in source.graph.initializer if tensor.name == "b2")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(12, 2.0**23, dtype=np.float32), "b2"))
    onnx.save(source, tmp_path / "source.onnx")
    graph = regauge.optimize(regauge.load(tmp_path / "source.onnx"), "simplify")
    assert "residuals" not in [edit.by for edit in graph.history]
    assert "last" in graph.parameters and "b2" in graph.parameters
