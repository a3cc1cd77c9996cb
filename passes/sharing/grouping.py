"""Which blocks share one set of weights, and how large the residuals may be: by what is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import Literal, TypeAlias, TypeVar

import numpy as np

from regauge.ir.errors import PassError
from regauge.passes.allocation.knapsack import Table

Members: TypeAlias = tuple[int, ...]
Grouping: TypeAlias = Literal["adjacent", "cycle", "nearest"]

_Key = TypeVar("_Key")

_MOST_BLOCKS = 16  # whose every run of neighbours is tried; more are dealt out evenly
_BINS = 1 << 12


def groups_of(count: int, kept: int, how: Grouping, loss: Callable[[Members], float]) -> list[Members]:
    """``count`` blocks in ``kept`` groups; ``loss`` tells what is lost once blocks of these numbers share.

    adjacent   runs of neighbours whose losses add up to least
    cycle      every so many blocks: the whole is a loop over ``kept`` blocks
    nearest    the two groups that lose least together are joined until so many are left
    """
    if how == "cycle":
        return [tuple(range(first, count, kept)) for first in range(kept)]
    if how == "nearest":
        return _joined(count, kept, loss)
    if count > _MOST_BLOCKS:
        edges = [round(place * count / kept) for place in range(kept + 1)]
        return [tuple(range(*pair)) for pair in zip(edges, edges[1:], strict=False)]
    return _runs(count, kept, loss)


def _runs(count: int, kept: int, loss: Callable[[Members], float]) -> list[Members]:
    """Runs of neighbours, by the best runs of the blocks before each start."""

    @cache
    def best(end: int, groups: int) -> tuple[float, tuple[int, ...]]:
        """The least loss of the first ``end`` blocks in so many groups, and where these begin."""
        if groups == 1:
            return loss(tuple(range(end))), (0,)
        found: tuple[float, tuple[int, ...]] = (float("inf"), (0,))
        for start in range(end - 1, groups - 2, -1):
            own = loss(tuple(range(start, end)))
            if own >= found[0]:  # longer runs lose no less: their losses are not asked for, which grow with the runs
                break
            before, starts = best(start, groups - 1)
            found = min(found, (before + own, (*starts, start)))
        return found

    starts = best(count, kept)[1]
    return [tuple(range(*pair)) for pair in zip(starts, (*starts[1:], count), strict=True)]


def _joined(count: int, kept: int, loss: Callable[[Members], float]) -> list[Members]:
    groups: list[Members] = [(block,) for block in range(count)]

    def gain(pair: tuple[Members, Members]) -> float:
        return loss(tuple(sorted(pair[0] + pair[1]))) - loss(pair[0]) - loss(pair[1])

    while len(groups) > kept:
        one, other = min(combinations(groups, 2), key=gain)
        groups = [group for group in groups if group not in (one, other)] + [tuple(sorted(one + other))]
    return sorted(groups)


def least_loss(options: Mapping[_Key, Sequence[tuple[int, float]]], allowed: float) -> tuple[dict[_Key, int], float]:
    """Of each item the option taken, so that costs stay within ``allowed``, and what is lost; options are (cost, loss).

    Raises PassError where the cheapest cost too much together.
    """
    costs = [np.array([np.ceil(cost / max(allowed, 1) * _BINS) for cost, _ in own]) for own in options.values()]
    losses = [np.array([loss for _, loss in own]) for own in options.values()]
    picks = Table(costs, losses, _BINS).solution(_BINS)
    if picks is None:
        least = sum(min(cost for cost, _ in own) for own in options.values())
        raise PassError(
            f"share: the budget of params cannot be met: it leaves {max(0, allowed):,.0f} for the layers that may be "
            f"shared, and these need {least:,.0f} or a little more"
        )
    return dict(zip(options, picks, strict=True)), sum(
        float(own[pick]) for own, pick in zip(losses, picks, strict=True)
    )
