"""Bounds of slices: the places that Python makes of them, for every size of the axis."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regauge.ir.errors import OperatorError
from regauge.ir.ops.slice_bounds import clamped, slice_places, spelled
from regauge.ir.sizes.expressions import Size, evaluate, simplify, symbol

N, M = symbol("N"), symbol("M")
NUMBERS = st.integers(-9, 9) | st.sampled_from([2**63 - 1, -(2**63)])
AXES = st.sampled_from([N, N + 3, 2 * N - 1, simplify(clamped(-4, N)), simplify(N - clamped(2, N)), 5])


@given(NUMBERS, NUMBERS, AXES)
def test_places_are_those_of_python_for_every_size(start: int, end: int, axis: Size) -> None:
    places = slice_places(start, end, axis)
    numbers = spelled(*places, axis)
    for number in range(1, 13):
        size = evaluate(axis, {N: number})
        kept = list(range(size))[start:end]
        first, last = evaluate(places, {N: number})
        assert 0 <= first <= last and list(range(size))[first:last] == kept
        again = slice(*evaluate(numbers, {N: number}))
        assert list(range(size))[again] == kept


def test_numbers_are_written_where_they_say_the_same() -> None:
    assert spelled(*slice_places(-2, 2**63 - 1, N), N) == (-2, 2**31 - 1)
    assert spelled(*slice_places(3, -1, N), N) == (3, -1)
    assert spelled(*slice_places(0, M, N), N) == (0, slice_places(0, M, N)[1])


def test_a_bound_of_unknown_sign_is_refused() -> None:
    with pytest.raises(OperatorError, match="N - 3 of a slice may count from the end"):
        clamped(N - 3, N)
