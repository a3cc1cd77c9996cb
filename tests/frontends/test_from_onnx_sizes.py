"""Contents that are known when a model is loaded: folded like numpy does it, symbolic where sizes are dynamic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from onnx_models import ATTENTION, ATTENTION_WEIGHTS, model_of
from onnx_oracle import assert_equals_runtime
from regauge.ir.folding.onnx_operators import Question, fold
from regauge.ir.sizes.expressions import symbol
from regauge.ir.sizes.onnx_contents import Content, Unknown, content, of_shape

N, T = symbol("n"), symbol("t")
INT64, FLOAT = onnx_ir.DataType.INT64, onnx_ir.DataType.FLOAT


def folded(op_type: str, *inputs: Any, **attributes: Any) -> Any:
    contents = [i if isinstance(i, Content) or i is None else content(np.asarray(i), INT64) for i in inputs]
    found = fold(Question(op_type, 18, contents, lambda name, default=None: attributes.get(name, default)))
    return found[0].array.tolist()


SHAPE = of_shape((N, 3, T, 8))


def test_the_usual_chains() -> None:
    assert folded("Gather", SHAPE, [0, 2]) == [N, T]
    assert folded("Slice", SHAPE, [1], [3]) == [3, T]
    assert folded("Slice", SHAPE, [1], [-1], [0]) == [3, T]
    assert folded("Concat", of_shape((N,)), [-1], axis=0) == [N, -1]
    assert folded("ReduceProd", SHAPE, keepdims=0) == 24 * N * T
    assert folded("Mul", of_shape((N, 2)), [2, 5]) == [2 * N, 10]
    assert folded("Unsqueeze", content(np.array(N, dtype=object), INT64), [0]) == [N]
    assert folded("Squeeze", of_shape((N,))) == N
    assert folded("Div", of_shape((2 * N, T)), [2, 2]) == [N, sympy.floor(T / 2)]
    assert folded("Add", of_shape((N,)), [1]) == [N + 1]
    assert folded("Max", of_shape((N,)), [1]) == [N]
    assert folded("Where", content([True, False], onnx_ir.DataType.BOOL), of_shape((N, 1)), of_shape((2, T))) == [N, T]


def test_relations_are_decided_where_they_hold_for_all_sizes() -> None:
    assert folded("Equal", of_shape((N, 4)), [-1, 4]) == [False, True]
    assert folded("Less", of_shape((N,)), of_shape((N + 1,))) == [True]
    (undecided,) = folded("Equal", of_shape((N,)), [1])
    assert undecided == sympy.Eq(N - 1, 0)
    with pytest.raises(Unknown):
        folded("Where", content(np.array([undecided], dtype=object), onnx_ir.DataType.BOOL), [1], [2])


def test_scale_of_attention() -> None:
    width = Content(np.array(16.0, np.float32), FLOAT)
    assert folded("Sqrt", width) == 4.0
    assert folded("Cast", content(np.array(16), INT64), to=int(FLOAT)) == 16.0


def test_what_would_grow_or_depends_on_data_is_unknown() -> None:
    for op_type, *inputs in (
        ("ConstantOfShape", [100000]), ("ConstantOfShape", of_shape((N,))), ("Range", [0], [10**6], [1]),
        ("Expand", [1], of_shape((N,))), ("Tile", [1], [100000]), ("Softmax", [1]),
    ):  # fmt: skip
        with pytest.raises(Unknown):
            folded(op_type, *inputs)


INTEGERS = st.lists(st.integers(-50, 50), min_size=1, max_size=6)
NUMPY = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Min": np.minimum, "Max": np.maximum}


@given(st.sampled_from(sorted(NUMPY)), INTEGERS, st.integers(-50, 50))
def test_arithmetic_agrees_with_numpy(op_type: str, numbers: list[int], other: int) -> None:
    assert folded(op_type, numbers, [other]) == NUMPY[op_type](numbers, other).tolist()


@given(INTEGERS, st.integers(-50, 50).filter(bool))
def test_integer_division_truncates(numbers: list[int], other: int) -> None:
    assert folded("Div", numbers, [other]) == [int(number / other) for number in numbers]


@given(st.sampled_from(["Add", "Mul", "Div", "Max", "Min"]), st.integers(1, 30), st.integers(1, 9))
def test_symbolic_results_agree_with_numbers(op_type: str, size: int, other: int) -> None:
    (symbolic,) = folded(op_type, of_shape((N + 3,)), [other])
    assert sympy.sympify(symbolic).subs(N, size) == folded(op_type, [size + 3], [other])[0]


def test_scale_computed_from_a_shape_is_frozen() -> None:
    """TorchScript spells the scale of attention as Sqrt(Cast(Gather(Shape))): it must not change when heads are cut."""
    graph = assert_equals_runtime(model_of(ATTENTION, ATTENTION_WEIGHTS))
    folds = {value.name: record for value, record in graph.metadata["onnx_folded"].items()}
    assert folds["scale"].content.item() == 2.0
    assert folds["scale"].parameter in graph.parameters
    assert folds["split"].content == (symbol("batch"), symbol("time"), 3, 4)
    assert folds["split"].parameter is None
    assert {group.size for group in graph.groups() if group.free} == {3, 4}
