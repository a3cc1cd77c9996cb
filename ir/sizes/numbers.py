"""Sizes computed with plain numbers: what sympy's substitution gives, without its search for simpler forms."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeAlias

import sympy

Number: TypeAlias = int | Fraction | bool

TRIED = [2**power + more for power in range(18) for more in (0, 1)]


def number_at(size: Any, values: Mapping[sympy.Symbol, int]) -> Number | None:
    """A size, or a relation between sizes, at values of its symbols; None where a part of it has no exact number."""
    try:
        found: Number = _number(size, values)
        return found
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def numbers_tried(size: Any) -> Iterator[Number | None]:
    """A size, or a relation between sizes, where its symbols are small, large and in between."""
    symbols = sorted(size.free_symbols, key=str)
    for number in TRIED:
        yield number_at(size, {name: number + place for place, name in enumerate(symbols)})


def takes_zero_and_more(size: Any) -> bool:
    """Whether a size is plainly zero for some values of its symbols, and not for others."""
    return _takes_both(size, lambda number: number == 0, lambda number: number != 0)


def takes_both_signs(size: Any) -> bool:
    """Whether a size is plainly above zero for some values of its symbols, and below it for others."""
    return _takes_both(size, lambda number: number > 0, lambda number: number < 0)


def _takes_both(size: Any, one: Callable[[Number], bool], other: Callable[[Number], bool]) -> bool:
    """Whether both hold for some of the numbers tried; False where one comes first that cannot be computed."""
    seen = [False, False]
    for number in numbers_tried(size):
        if number is None:
            return False
        seen = [seen[0] or one(number), seen[1] or other(number)]
        if all(seen):
            return True
    return False


@lru_cache(maxsize=1 << 14)
def fingerprint(size: Any) -> tuple[Number, ...] | None:
    """A size at four values of each symbol, which are always the same ones: sizes that differ here are not equal.

    None where it cannot be computed with plain numbers.
    """
    found = []
    for least, range_ in ((1, 3), (5, 97), (1_000, 5_003), (100_000, 90_001)):
        values = {name: least + zlib.crc32(name.name.encode()) % range_ for name in size.free_symbols}
        number = number_at(size, values)
        if number is None:
            return None
        found.append(number)
    return tuple(found)


def _number(size: Any, values: Mapping[sympy.Symbol, int]) -> Any:
    if isinstance(size, int):
        return size
    if size.is_Symbol:
        return values[size]
    if size.is_Rational:
        return int(size.p) if size.q == 1 else Fraction(int(size.p), int(size.q))
    compute = _COMPUTED[size.func]
    found = compute(*[_number(part, values) for part in size.args])
    return found.numerator if isinstance(found, Fraction) and found.denominator == 1 else found


def _power(base: Any, exponent: Any) -> Any:
    if not isinstance(exponent, int):
        raise TypeError("a root has no exact number")
    return Fraction(base) ** exponent if exponent < 0 else base**exponent


_COMPUTED: dict[Any, Callable[..., Any]] = {
    sympy.Add: lambda *parts: sum(parts),
    sympy.Mul: lambda *parts: math.prod(parts),
    sympy.Pow: _power,
    sympy.floor: math.floor,
    sympy.ceiling: math.ceil,
    sympy.Mod: lambda a, b: a % b,
    sympy.Min: min,
    sympy.Max: max,
    sympy.Eq: lambda a, b: a == b,
    sympy.Ne: lambda a, b: a != b,
    sympy.Lt: lambda a, b: a < b,
    sympy.Le: lambda a, b: a <= b,
    sympy.Gt: lambda a, b: a > b,
    sympy.Ge: lambda a, b: a >= b,
    sympy.And: lambda *parts: all(parts),
    sympy.Or: lambda *parts: any(parts),
    sympy.Not: lambda part: not part,
}
