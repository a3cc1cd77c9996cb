"""The bounds of slices as places on an axis: counted from the end, clamped, and written as numbers again."""

from __future__ import annotations

import sympy

from regauge.ir.errors import OperatorError
from regauge.ir.sizes.expressions import Size, at_least, same, simplify

ANYWHERE = 2**31 - 1  # exporters write a number at least as large for "to the end of the axis"


def bound(value: Size, size: Size) -> Size:
    """A bound whose program holds only where it lies on the axis: torch compared the two and guards what it found.

    So a bound that cannot be compared with a dynamic size stays as it is; :func:`clamped` tells what ONNX makes of it.
    """
    value = simplify(value)
    negative = value < 0 if isinstance(value, int) else bool(value.is_negative)
    if negative:
        value = simplify(value + size)
    if isinstance(value, int) and (value >= ANYWHERE or isinstance(size, int)):
        return size if value >= ANYWHERE else max(0, min(value, int(size)))
    beyond = simplify(value - size)
    return size if not isinstance(beyond, int) and beyond.is_nonnegative else value


def clamped(value: Size, size: Size) -> Size:
    """One bound of a slice as a place between 0 and ``size``, for every value of the dynamic sizes.

    Raises OperatorError where it depends on them whether the bound counts from the end.
    """
    value = simplify(value)
    if isinstance(value, int):
        if abs(value) >= ANYWHERE:
            return size if value > 0 else 0
        negative = value < 0
    elif value.is_negative or at_least(value, 0):
        negative = bool(value.is_negative)
    else:
        raise OperatorError(f"the bound {value} of a slice may count from the end or from the start")
    place = simplify(value + size if negative else sympy.Min(value, size))
    if at_least(place, 0):
        return place
    return 0 if isinstance(place, int) else simplify(sympy.Max(0, place))


def slice_places(start: Size, end: Size, size: Size) -> tuple[Size, Size]:
    """Where a slice begins and ends, the end not before the beginning, for every value of the dynamic sizes."""
    first, last = clamped(start, size), clamped(end, size)
    if isinstance(first, int) and isinstance(last, int):
        return first, max(first, last)
    return first, simplify(sympy.Max(first, last))


def spelled(start: Size, end: Size, size: Size) -> tuple[Size, Size]:
    """A slice with numbers for its places where ONNX makes the same places of them: ``-2`` for ``Max(0, N - 2)``."""
    starts = [number for number in _numbers(start, size) if same(clamped(number, size), start)]
    first = starts[0] if starts else start
    ends = [ANYWHERE] if same(end, size) else []
    ends += [number for number in _numbers(end, size) if same(_later(start, clamped(number, size)), end)]
    return first, ends[0] if ends else end


def _later(first: Size, last: Size) -> Size:
    both_known = isinstance(first, int) and isinstance(last, int)
    return max(first, last) if both_known else simplify(sympy.Max(first, last))


def _numbers(place: Size, size: Size) -> list[int]:
    """The numbers that a place may come from."""
    if isinstance(place, int):
        return [place]
    behind = simplify(place - size)
    inside = sorted({abs(int(number)) for number in place.atoms(sympy.Integer)})
    found = [behind] if isinstance(behind, int) and behind < 0 else []
    return found + [sign * number for number in inside for sign in (1, -1) if sign * number]
