"""Scales of data: powers of two that are known, times one that is computed in each run where norms are taken there.

All arithmetic on them is on powers of two, which multiply without rounding; what is known adds no node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from regauge.ir.dtypes import Dtype
from regauge.ir.edit import Builder
from regauge.ir.graph import Value

LEAST_NORM = 1e-4  # as in Scalify: data that is nearly zero is not blown up
MOST_NORM = 1e30


@dataclass(frozen=True)
class Factor:
    """2^exponent, times a value without axes where there is one."""

    exponent: int = 0
    value: Value | None = None

    @property
    def is_one(self) -> bool:
        return self.exponent == 0 and self.value is None


ONE = Factor()


class FactorBuilder:
    """Arithmetic on scales in one graph; values are of one type, ``wide``."""

    def __init__(self, build: Builder, wide: torch.dtype) -> None:
        self.build, self.wide = build, wide
        self._made: dict[tuple[Any, ...], Value] = {}

    def times(self, a: Factor, b: Factor) -> Factor:
        if a.value is None or b.value is None:
            return Factor(a.exponent + b.exponent, a.value if b.value is None else b.value)
        return Factor(a.exponent + b.exponent, self._once("mul", a.value, b.value))

    def power(self, factor: Factor, power: Fraction) -> Factor | None:
        """None where the result would be no power of two, or a run would have to tell."""
        exponent = factor.exponent * power
        if exponent.denominator != 1 or (factor.value is not None and power.denominator != 1):
            return None
        if factor.value is None or not power:
            return Factor(int(exponent))
        value = one = factor.value if power > 0 else self._once("reciprocal", factor.value)
        for _ in range(abs(int(power)) - 1):  # exact, which pow is not in all runtimes
            value = self._once("mul", value, one)
        return Factor(int(exponent), value)

    def inverse(self, factor: Factor) -> Factor:
        found = self.power(factor, Fraction(-1))
        assert found is not None
        return found

    def greatest(self, factors: Iterable[Factor]) -> Factor:
        """The greatest scale, which is also what the unit-variance rule of sums rounds down to."""
        first, *others = dict.fromkeys(factors)
        for other in others:
            if first.value is other.value:
                first = Factor(max(first.exponent, other.exponent), first.value)
            else:
                first = Factor(0, self._once("maximum", self.whole(first), self.whole(other)))
        return first

    def whole(self, factor: Factor) -> Value:
        """A scale as one value."""
        if factor.value is None:
            key = ("constant", factor.exponent)
            if key not in self._made:
                self._made[key] = self.build.constant(torch.tensor(2.0**factor.exponent, dtype=self.wide), "scale")
            return self._made[key]
        return factor.value if not factor.exponent else self._once("mul", factor.value, 2.0**factor.exponent)

    def _once(self, op: str, *operands: Any, **attributes: Any) -> Value:
        """The result of an operator on scales; the same where it was asked for before."""
        key = (op, *operands, *attributes.values())
        if key not in self._made:
            self._made[key] = self.build(op, *operands, name="scale", **attributes)
        return self._made[key]

    def rounded_down(self, norm: Value) -> Value:
        """The greatest power of two below a norm."""
        bounded = self.build.clamp(norm, LEAST_NORM, MOST_NORM)
        value: Value = self.build.exp2(self.build.floor(self.build.log2(bounded)), name="scale")
        return value

    def norm(self, x: Value, kind: str) -> Value:
        """The greatest entry, the mean of the magnitudes, or the root of the mean square, without axes."""
        x = x if x.dtype == self.wide else self.build.cast(x, dtype=self.wide)
        build, dims = self.build, tuple(range(x.rank))
        sizes: Value = build.abs(x)
        if not dims:
            return sizes
        match kind:
            case "max":
                return build.amax(sizes, dims=dims)  # type: ignore[no-any-return]
            case "l1":
                return build.mean(sizes, dims=dims)  # type: ignore[no-any-return]
            case _:
                return build.sqrt(build.mean(build.mul(x, x), dims=dims))  # type: ignore[no-any-return]

    def multiplied(self, x: Value, factor: Factor) -> Value:
        """Data times a scale, in the type of the data."""
        if factor.value is not None:
            scaled: Value = self.build.mul(x, self._as(self.whole(factor), x.dtype))
            return scaled
        rest, low, high = factor.exponent, *_steps(x.dtype)
        while rest:  # numbers that the type cannot hold are multiplied by in steps
            step = min(max(rest, low), high)
            x = self.build.mul(x, 2.0**step)
            rest -= step
        return x

    def _as(self, value: Value, dtype: Dtype) -> Value:
        if value.dtype == dtype:
            return value
        low, high = _steps(dtype)
        return self._once("cast", self._once("clamp", value, 2.0**low, 2.0**high), dtype=dtype)


def _steps(dtype: Dtype) -> tuple[int, int]:
    """The least and the greatest exponent of a power of two that a type holds exactly."""
    return (-14, 15) if dtype == torch.float16 else (-126, 127)


def exponent_below(size: float) -> int:
    """The exponent of the greatest power of two that is not above a positive number."""
    return math.frexp(size)[1] - 1
