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


FILLED = """
<ir_version: 8, opset_import: ["" : 18]>
filled (float[2, ROWS] x) => (float[2, 48] y) {
  short = Expand (half, size)
  long = Expand (half, twice)
  part = Slice (long, zero, size)
  h = MatMul (x, w)
  a = Max (h, short)
  b = Sin (a)
  y = Max (b, part)
}
"""


@pytest.mark.parametrize("rows", [64, 96])
def test_equal_constants_take_room_once(rows: int, tmp_path: Path) -> None:
    """Each of the two takes 192 bytes, 128 more than its node; the file may grow by two percent of 192 bytes a row."""
    vectors = {"zero": np.array([0]), "size": np.array([48]), "twice": np.array([96])}
    model = parsed(FILLED.replace("ROWS", str(rows)), w=normal(rows, 48), half=np.float32(0.5), **vectors)
    small = simplified_twice(model, tmp_path)
    assert operators(small) == {"MatMul": 1, "Max": 2, "Sin": 1}
    assert_equal_runs(model, small, {"x": normal(2, rows)})


GATHERED = """
<ir_version: 8, opset_import: ["" : 18]>
gathered (float[20, 100] x) => (float[20, 100] y) {
  h = MatMul (x, w)
  f = Gather (first, rows)
  g = Gather (second, rows)
  a = Add (h, f)
  b = Sin (a)
  y = Mul (b, g)
}
"""


def test_a_second_run_grants_no_second_growth(tmp_path: Path) -> None:
    """Of two tables one may be spread over the rows: 6 KB, and 0.7 MB may grow by a percent, twice."""
    text = GATHERED.replace("x)", "x, float[20, 1650] z)").replace("y)", "y, float[20, 100] v)")
    text = text.replace("y = Mul (b, g)", "y = Mul (b, g)  v = MatMul (z, u)")
    tables = {"first": normal(4, 100), "second": normal(4, 100) + 1}
    model = parsed(text, w=normal(100, 100), u=normal(1650, 100), rows=np.arange(20) % 4, **tables)
    small = simplified_twice(model, tmp_path)
    assert operators(small) == {"MatMul": 2, "Gather": 1, "Add": 1, "Sin": 1, "Mul": 1}
    assert_equal_runs(model, small, {"x": normal(20, 100), "z": normal(20, 1650)})


def test_an_index_that_the_file_computes_goes_with_what_it_picks(tmp_path: Path) -> None:
    """The file would hold the index otherwise: 160 bytes of 640, of which 128 are the table's and 400 may be added."""
    text = (
        GATHERED.replace("20, 100]", "20, 8]")
        .replace("x)", "x, float[20, 100] z)")
        .replace("y)", "y, float[20, 100] v)")
    )
    text = text.replace("h = MatMul (x, w)", "v = MatMul (z, w)  rows = Expand (one, many)")
    text = text.replace("(h, f)", "(x, f)").replace("g = Gather (second, rows)", "").replace("Mul (b, g)", "Sin (b)")
    model = parsed(text, w=normal(100, 100), first=normal(4, 8), one=np.array([1]), many=np.array([20]))
    small = simplified_twice(model, tmp_path)
    assert operators(small) == {"MatMul": 1, "Add": 1, "Sin": 2}
    assert_equal_runs(model, small, {"x": normal(20, 8), "z": normal(20, 100)})
