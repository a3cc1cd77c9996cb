"""One allocator for every pass that must meet a budget: which Dim keeps how many indices.

A *plan* turns one number, the level between 0 (keep all) and 1 (keep the least), into a count for every Dim; counts
only fall as the level rises. The level is found by bisection on the cost, and what the last step of a plan takes too
much of is given back index by index, so that the target is met as closely as single indices allow and never exceeded.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np

from regauge.ir.cost import Running
from regauge.ir.errors import PassError
from regauge.ir.extents import Dim
from regauge.ir.tables import short
from regauge.passes.rounding import Rounding

_AMOUNT = re.compile(r"(\d+\.?\d*|\.\d+)\s*(k|m|g|ki|mi|gi)?(b?)", re.IGNORECASE)
_FACTOR = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_CLOSE = 0.01  # a budget is met when it is used to within one percent
_BISECTIONS = 40
_MOST_EXCHANGED = 64  # Dims; the search for a closer fit tries each of them

Counts: TypeAlias = dict[Dim, int]
Plan: TypeAlias = Callable[[float], Counts]
Wishes: TypeAlias = Callable[[float], Mapping[Dim, float]]


class Amount(NamedTuple):
    """A budget: a share of what the graph has, or a number."""

    value: float
    relative: bool

    def of(self, original: float) -> float:
        return self.value * original if self.relative else self.value


def parse_amount(given: float | int | str, option: str) -> Amount:
    """``0.5`` is a share, ``1200000``, ``1.2M`` and ``5MB`` are numbers, as text too; else raises PassError."""
    if isinstance(given, str):
        match = _AMOUNT.fullmatch(given.strip())
        if match is None:
            raise PassError(
                f"{option}={given} is not an amount: write a share such as 0.5, or a number such as 1.2M or 5MB"
            )
        if not (match.group(2) or match.group(3)):
            return parse_amount(float(match.group(1)), option)
        return Amount(float(match.group(1)) * _FACTOR[(match.group(2) or "").lower()], relative=False)
    if not given > 0 or math.isinf(given):
        raise PassError(
            f"{option}={given:g} is out of range: write a share above 0 and up to 1, or a number such as 1.2M"
        )
    if given > 1 and given != int(given):
        raise PassError(
            f"{option}={given:g} is neither a share, which is at most 1, nor a whole number: "
            f"write {option}=0.5 to keep half, or a number such as 1.2M"
        )
    return Amount(float(given), relative=given <= 1)


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


def uniform_plan(choices: Sequence[Choice]) -> Plan:
    """Every Dim keeps the same share of its indices: the level is the share that goes."""
    return _rounded(choices, uniform_wishes(choices))


def ranked_plan(choices: Sequence[Choice]) -> Plan:
    """Indices of all Dims are ranked together: the level is the share of them that goes, the lowest scores first."""
    return _rounded(choices, ranked_wishes(choices))


def _rounded(choices: Sequence[Choice], wishes: Wishes) -> Plan:
    def plan(level: float) -> Counts:
        wanted = wishes(level)
        return {choice.dim: choice.rounded(wanted[choice.dim]) for choice in choices}

    return plan


def uniform_wishes(choices: Sequence[Choice]) -> Wishes:
    """What :func:`uniform_plan` would keep if any count were allowed."""
    return lambda level: {choice.dim: (1 - level) * choice.size for choice in choices}


def ranked_wishes(choices: Sequence[Choice]) -> Wishes:
    """What :func:`ranked_plan` would keep if any count were allowed."""
    pooled = np.sort(np.concatenate([choice.scores for choice in choices])) if choices else np.zeros(0)
    ordered = {choice.dim: np.sort(choice.scores) for choice in choices}

    def wishes(level: float) -> dict[Dim, float]:
        gone = round(level * len(pooled))
        threshold = pooled[gone] if gone < len(pooled) else np.inf
        return {dim: len(own) - int(np.searchsorted(own, threshold, side="left")) for dim, own in ordered.items()}

    return wishes


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


def allocate(choices: Sequence[Choice], plan: Plan, running: Running, target: float, what: str) -> Counts:
    """Counts whose cost is at most ``target`` and, where single indices are that fine, within 1 % of it.

    Raises PassError when even the smallest counts cost more. Time grows with the number of Dims times the logarithm of
    their sizes, and with the size of the graph.
    """
    if running.total <= target:
        return {choice.dim: choice.size for choice in choices}
    least = {choice.dim: choice.least for choice in choices}
    if running.set_sizes(least) > target:
        raise PassError(
            f"{what} cannot be met: with every Dim as small as it may be, {short(running.total)} of "
            f"{short(running.original)} are left, and {short(target)} are wanted; "
            "raise the budget, exclude less, or lower minimum or round_to"
        )
    fits, exceeds = _bisect(plan, running, target, least)
    running.set_sizes(fits)
    _give_back(choices, running, target, fits, exceeds)
    everything = {choice.dim: choice.size for choice in choices}
    if running.total < (1 - _CLOSE) * target:
        _give_back(choices, running, target, fits, everything)
    if running.total < (1 - _CLOSE) * target and len(choices) <= _MOST_EXCHANGED:
        fits = _exchange(choices, running, target, fits, everything)
    return fits


def _exchange(
    choices: Sequence[Choice], running: Running, target: float, counts: Counts, most: Mapping[Dim, int]
) -> Counts:
    """Closer counts for a graph of few Dims, whose single indices are too coarse: lower one Dim, raise the others."""
    best, used, improved = dict(counts), running.total, True
    while improved and used < (1 - _CLOSE) * target:
        improved, start = False, dict(best)
        for choice in choices:
            lower = choice.below(start[choice.dim])
            if lower == start[choice.dim]:
                continue
            trial = {**start, choice.dim: lower}
            running.set_sizes(trial)
            _give_back(choices, running, target, trial, {**most, choice.dim: lower})
            if running.total > used:
                best, used, improved = trial, running.total, True
    running.set_sizes(best)
    return best


def _bisect(plan: Plan, running: Running, target: float, least: Counts) -> tuple[Counts, Counts]:
    """Counts of the plan just below and just above the target."""
    low, high = 0.0, 1.0
    fits, exceeds = dict(least), plan(0.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        counts = plan(middle)
        if running.set_sizes(counts) <= target:
            high, fits = middle, counts
            if running.total >= (1 - _CLOSE / 4) * target:
                break
        else:
            low, exceeds = middle, counts
        if fits == exceeds:
            break
    return fits, exceeds


def _give_back(
    choices: Sequence[Choice], running: Running, target: float, counts: Counts, most: Mapping[Dim, int]
) -> None:
    """Raise counts towards ``most``, the best scores first, as long as the cost stays within the target."""
    ranks = {choice.dim: np.sort(choice.scores)[::-1] for choice in choices}
    queue = [
        (-float(ranks[choice.dim][counts[choice.dim]]), place)
        for place, choice in enumerate(choices)
        if counts[choice.dim] < min(most[choice.dim], choice.size)
    ]
    heapq.heapify(queue)
    while queue and running.total < (1 - _CLOSE / 10) * target:
        _, place = heapq.heappop(queue)
        choice = choices[place]
        wider = choice.above(counts[choice.dim])
        if wider > most[choice.dim] or running.with_size(choice.dim, wider) > target:
            continue  # costs only grow from here on, so what does not fit now never will
        running.set_sizes({choice.dim: wider})
        counts[choice.dim] = wider
        if wider < min(most[choice.dim], choice.size):
            heapq.heappush(queue, (-float(ranks[choice.dim][wider]), place))
