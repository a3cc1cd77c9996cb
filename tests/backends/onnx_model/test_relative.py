"""What an ONNX node says may be relative to its operand: a node that reads another operand now is written anew."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_simplified import assert_equal_runs, normal, parsed, simplified

SLICES = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[{shape}] x) => (float[{result}] y)
<int64[1] first = {{0}}, int64[1] second = {{1}}, int64[1] third = {{3}}, int64[1] last = {{-1}},
 int64[1] end = {{9223372036854775807}}> {{
    h = Slice(x, {inner})
    y = Slice(h, {outer})
}}
"""


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("first, third, second", "second, end, second"),
        ("first, last, second", "first, last, second"),
        ("first, last, second", "second, last, second"),
    ],
)
@pytest.mark.parametrize("columns", ["7", "N"])
def test_bounds_of_a_slice_of_a_slice(inner: str, outer: str, columns: str, tmp_path: Path) -> None:
    result = "2, M"
    model = parsed(SLICES.format(shape=f"2, {columns}", result=result, inner=inner, outer=outer))
    small = simplified(model, tmp_path)
    assert len(small.graph.node) == 1 or columns == "N"
    assert_equal_runs(model, small, {"x": normal(2, 7)})


@pytest.mark.parametrize(
    "text",
    [
        "h = Concat<axis = 0>(x, table)\n y = Gather<axis = 0>(h, behind)",
        "h = Squeeze(x, zero)\n y0 = Reshape(h, rest)\n y = Neg(y0)",
        "h = Gather<axis = 1>(x, pair)\n y = Slice(h, one, end, one)",
    ],
)
def test_indices_and_targets_of_another_operand(text: str, tmp_path: Path) -> None:
    weights = {"table": normal(2, 6, 5)}
    extra = ", h" if "Squeeze" in text else ""
    model = parsed(
        f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 6, 5] x) => (y{extra})
        <float[2, 6, 5] table, int64 behind = {{-3}}, int64[1] zero = {{0}}, int64[1] one = {{1}},
         int64[2] rest = {{0, -1}}, int64[2] pair = {{0, 2}}, int64[1] end = {{9223372036854775807}}> {{ {text} }}
        """,
        **weights,
    )
    small = simplified(model, tmp_path)
    assert_equal_runs(model, small, {"x": normal(1, 6, 5)})


def test_the_stated_kernel_of_a_convolution_is_that_of_its_merged_weight(tmp_path: Path) -> None:
    model = parsed(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 2, 6, 6] x) => (float[1, 1, 4, 4] y)
        <float[1, 2, 3, 3] wide, float[1, 1, 1, 1] narrow, float[1] bias> {
            h = Conv<kernel_shape = [3, 3]>(x, wide)
            y = Conv<kernel_shape = [1, 1]>(h, narrow, bias)
        }
        """,
        wide=normal(1, 2, 3, 3),
        narrow=normal(1, 1, 1, 1),
        bias=normal(1),
    )
    small = simplified(model, tmp_path)
    (node,) = small.graph.node
    assert list(onnx.helper.get_node_attr_value(node, "kernel_shape")) == [3, 3]
    assert_equal_runs(model, small, {"x": np.ascontiguousarray(normal(1, 2, 6, 6))})
