"""What is given for inputs: widths are changed, kinds and shapes that differ are told with the input."""

from typing import Any

import numpy as np
import pytest
import torch

from regauge.ir.edit import Builder
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph
from regauge.ir.running.given_inputs import fitted
from regauge.ir.sizes.expressions import symbol

BATCH = symbol("batch")


def graph(shape: tuple[Any, ...] = (BATCH, 3), dtype: torch.dtype = torch.float32, *more: tuple[Any, ...]) -> Graph:
    made = Graph("net", symbols={BATCH: (1, None)})
    build = Builder(made)
    made.outputs = [build.identity(build.input("x", shape, dtype))]
    for number, other in enumerate(more):
        build.input(f"y{number}", other, torch.int64)
    return made


@pytest.mark.parametrize("as_mapping", [False, True])
def test_what_fits_is_what_was_given(as_mapping: bool) -> None:
    x, labels = torch.zeros(4, 3), torch.zeros(4)
    given: Any = {"x": x, "labels": labels} if as_mapping else (x,)
    found, notes = fitted(graph(), given)
    assert notes == [] and (found["x"] if isinstance(found, dict) else found[0]) is x
    assert not as_mapping or found["labels"] is labels  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("given", "dtype", "note"),
    [
        (np.zeros((4, 3)), torch.float32, "x is f64[4,3], taken as f32"),
        (torch.zeros(4, 3), torch.float16, "x is f32[4,3], taken as f16"),
        (np.zeros((4, 3), np.int32), torch.int64, "x is i32[4,3], taken as i64"),
        (torch.full((4, 3), 200), torch.uint8, "x is i64[4,3], taken as u8"),
        (torch.ones(4, 3, dtype=torch.int64), torch.bool, "x is i64[4,3], taken as bool"),
    ],
)
def test_numbers_are_brought_to_the_width_of_the_input(given: Any, dtype: torch.dtype, note: str) -> None:
    (x,), notes = fitted(graph(dtype=dtype), (given,))  # type: ignore[misc]
    assert notes == [note] and x.dtype == dtype
    assert torch.equal(x.double(), torch.as_tensor(given).double())


@pytest.mark.parametrize(
    ("given", "dtype", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.int64), torch.float32, "x is i64[4,3], the model takes f32[batch,3]: give"),
        (torch.zeros(4, 3), torch.int64, "x is f32[4,3], the model takes i64[batch,3]: give it in that type"),
        (torch.full((4, 3), 300), torch.uint8, "x is i64[4,3], the model takes u8[batch,3]: give it in that type"),
        (torch.zeros(4, 5), torch.float32, "x is f32[4,5], the model takes f32[batch,3]: give it in that shape"),
        (np.zeros((2, 4, 3)), torch.float32, "x is f64[2,4,3], the model takes f32[batch,3]: give it in that shape"),
    ],
)
def test_what_differs_otherwise_is_told(given: Any, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        fitted(graph(dtype=dtype), [given])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("sizes", [(4, 3, 8), (1, 3, 8), (1, 5, 8)])
def test_data_of_a_static_model_may_have_another_number_of_examples(sizes: tuple[int, ...]) -> None:
    """Which axis they are on is not known: some models have them behind the steps of a sequence."""
    assert fitted(graph((1, 3, 8)), [torch.zeros(sizes)])[1] == []
    with pytest.raises(GraphError, match=r"the model takes f32\[1,3,8\]"):
        fitted(graph((1, 3, 8)), [torch.zeros(4, 5, 8)])


def test_inputs_with_defaults_may_be_absent() -> None:
    made = graph((BATCH, 3), torch.float32, (BATCH,))
    assert fitted(made, [torch.zeros(4, 3)])[1] == [], "too few: whoever runs the graph says so"
    made.metadata["input_defaults"] = {"y0": None}
    (x,), notes = fitted(made, [np.zeros((4, 3))])  # type: ignore[misc]
    assert x.dtype == torch.float32 and notes == ["x is f64[4,3], taken as f32"]
