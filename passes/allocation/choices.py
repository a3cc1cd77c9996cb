"""Choices of an allocator: for every Dim a count of the indices that it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from regauge.ir.dims.extents import Dim
from regauge.passes.rounding import Rounding

Counts: TypeAlias = dict[Dim, int]


@dataclass(frozen=True)
class Choice:
    """A Dim that may be cut: its scores (high ones are kept), the least it keeps, what its counts are multiples of."""

    dim: Dim
    scores: np.ndarray
    floor: int = 1
    multiple: int = 1

    @property
    def size(self) -> int:
        return len(self.scores)

    @property
    def stuck(self) -> bool:
        """Whether no smaller count is a multiple, though the floor would allow one."""
        return self.least == self.size > self.floor

    @property
    def least(self) -> int:
        """The smallest count allowed."""
        return self.rounded(0)

    def rounded(self, count: float) -> int:
        """The allowed count nearest to ``count``: all indices, or a multiple between the floor and the size."""
        if count >= self.size or self.size <= self.multiple:
            return self.size
        wanted = math.floor(max(count, self.floor) / self.multiple + 0.5)
        lowest = max(1, math.ceil(self.floor / self.multiple))
        return min(max(wanted, lowest) * self.multiple, self.size // self.multiple * self.multiple)

    def above(self, count: int) -> int:
        """The next allowed count above ``count``."""
        return min(count // self.multiple * self.multiple + self.multiple, self.size)

    def below(self, count: int) -> int:
        """The next allowed count below ``count``, or ``count`` itself when it is the least."""
        lower = (count - 1) // self.multiple * self.multiple
        return count if lower < self.least else lower


def round_wishes(
    choices: Sequence[Choice], wanted: Mapping[Dim, float], rounding: Rounding
) -> list[tuple[Choice, int]]:
    """Each choice with what its count must be a multiple of, and that count; in the order they were decided in."""
    by_dim, decided = {choice.dim: choice for choice in choices}, dict[Dim, int]()
    result = []
    for dim in rounding.ordered(list(by_dim)):
        choice = replace(by_dim[dim], multiple=rounding.needed(dim, decided))
        decided[dim] = choice.rounded(wanted[dim])
        result.append((choice, decided[dim]))
    return result


def with_multiples(choices: Sequence[Choice], rounding: Rounding) -> list[Choice]:
    """The choices with multiples that keep axes rounded whatever counts the others get, for counts found by search."""
    decided, found = dict[Dim, int](), dict[Dim, Choice]()
    by_dim = {choice.dim: choice for choice in choices}
    for dim in rounding.ordered(list(by_dim)):
        choice = found[dim] = replace(by_dim[dim], multiple=rounding.needed(dim, decided))
        decided[dim] = choice.size if choice.least == choice.size else math.gcd(choice.multiple, choice.size)
    return [found[choice.dim] for choice in choices]
