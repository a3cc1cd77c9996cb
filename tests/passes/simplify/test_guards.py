"""Zeros in the place of NaN behind a softmax become a threshold, to the last bit, where the runtime has one."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import regauge
from onnx_oracle import runtime_outputs
from onnx_simplified import normal, parsed, simplified
from regauge.ir.running.interpret import run

GUARDED = """<ir_version: 8, opset_import: ["" : OPSET]>
net (TYPE[2, 3, 5] x, bool[2, 3, 5] keep) => (TYPE[2, 3, 5] y) {
  s = Where (keep, x, low)
  p = SOFTMAX (s)
  n = IsNaN (p)
  w = Where (n, zero, p)
  y = MatMul (w, v)
}
"""
SOFTMAX = "Softmax <axis = -1>"


def model(opset: int = 17, kind: str = "float", softmax: str = SOFTMAX, zero: float = 0.0) -> onnx.ModelProto:
    text = GUARDED.replace("OPSET", str(opset)).replace("TYPE", kind).replace("SOFTMAX", softmax)
    number = np.float64 if kind == "double" else np.float32
    return parsed(text, low=number(-np.inf), zero=number(zero), v=normal(5, 5).astype(number))


def count(found: onnx.ModelProto, kind: str) -> int:
    return sum(node.op_type == kind for node in found.graph.node)


@pytest.mark.parametrize(
    ("options", "made"),
    [
        ({}, 1),
        ({"opset": 13}, 1),
        ({"opset": 22}, 1),
        ({"opset": 9, "softmax": "Softmax <axis = 2>"}, 0),
        ({"kind": "double"}, 0),
        ({"softmax": "LogSoftmax <axis = -1>"}, 0),
        ({"zero": 1.0}, 0),
    ],
    ids=["plain", "opset-13", "opset-22", "opset-9", "double", "signed", "no-zero"],
)
def test_nan_of_masked_rows_is_cut_off_by_a_threshold(tmp_path: Path, options: dict[str, object], made: int) -> None:
    source = model(**options)  # type: ignore[arg-type]
    small = simplified(source, tmp_path)
    assert [count(small, kind) for kind in ("ThresholdedRelu", "IsNaN")] == [made, 1 - made]
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float64 if "kind" in options else np.float32)
    keep = x > -0.5
    keep[0, 1] = False  # a row that is masked as a whole
    feeds = {"x": x, "keep": keep}
    (expected,), (found,) = runtime_outputs(source, feeds), runtime_outputs(small, feeds)
    np.testing.assert_array_equal(found, expected)
    assert "zero" in options or not found[0, 1].any()


def test_a_threshold_is_read_as_the_runtime_computes_it(tmp_path: Path) -> None:
    """torch's threshold keeps NaN, that of ONNX does not."""
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[4] x) => (float[4] y) {
      y = ThresholdedRelu <alpha = 0.5> (x)
    }"""
    path, x = tmp_path / "source.onnx", np.array([np.nan, 0.4, 0.5, 0.6], dtype=np.float32)
    onnx.save(parsed(text), path)
    (expected,) = runtime_outputs(parsed(text), {"x": x})
    (found,) = run(regauge.load(path), [torch.from_numpy(x)])
    np.testing.assert_array_equal(found.numpy(), expected)
