"""A second run of ``simplify`` on its own result changes nothing: the first took what folding in the file opens up."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import regauge
from onnx_oracle import quietly_loaded
from onnx_simplified import assert_equal_runs, normal, operators, parsed


def simplified_twice(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model after one run; that the second gives the same bytes is asserted."""
    once, twice = folder / "once.onnx", folder / "twice.onnx"
    onnx.save(model, folder / "source.onnx")
    for source, target in ((folder / "source.onnx", once), (once, twice)):
        regauge.optimize(quietly_loaded(source), "simplify").to_onnx(target)
    assert twice.read_bytes() == once.read_bytes()
    return onnx.load(once)


TIED = """
<ir_version: 8, opset_import: ["" : 18]>
tied (int64[2, 5] ids) => (float[2, 5, 50] y) {
  x = Gather (w, ids)
  h = Relu (x)
  turned = Transpose <perm = [1, 0]> (w)
  y = MatMul (h, turned)
}
"""


def test_a_product_with_a_tied_weight_stays_as_it_is_spelled(tmp_path: Path) -> None:
    """It was read as a linear layer, and written with another Transpose of another name."""
    model = parsed(TIED, w=normal(50, 8))
    small = simplified_twice(model, tmp_path)
    assert [node.output[0] for node in small.graph.node] == ["x", "h", "turned", "y"]
    assert_equal_runs(model, small, {"ids": np.arange(10).reshape(2, 5)})


@pytest.mark.parametrize(("shape", "products"), [("2, 8", {"Gemm": 1}), ("2, 5, 8", {"MatMul": 1})])
def test_a_product_with_a_weight_of_its_own_needs_no_transpose(
    shape: str, products: dict[str, int], tmp_path: Path
) -> None:
    text = TIED.replace("int64[2, 5] ids", f"float[{shape}] x").replace("x = Gather (w, ids)", "")
    text = text.replace("2, 5, 50", shape.replace("8", "50"))
    model = parsed(text, w=normal(50, 8))
    small = simplified_twice(model, tmp_path)
    assert operators(small) == {"Relu": 1, **products}
    assert_equal_runs(model, small, {"x": normal(*map(int, shape.split(",")))})


def test_a_gemm_takes_in_the_transpose_of_a_tied_weight(tmp_path: Path) -> None:
    text = TIED.replace("[2, 5]", "[5]").replace("2, 5, 50", "5, 50")
    model = parsed(text, w=normal(50, 8))
    small = simplified_twice(model, tmp_path)
    assert operators(small) == {"Gather": 1, "Relu": 1, "Gemm": 1}
    assert_equal_runs(model, small, {"ids": np.arange(5)})
