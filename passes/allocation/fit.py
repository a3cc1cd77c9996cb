"""Counts that meet budgets: the level of a plan is found by bisection, and single indices are given back.

What the last step of a plan takes too much of is given back index by index, so that the target is met as closely as
single indices allow and never exceeded.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from regauge.ir.dims.extents import Dim
from regauge.ir.errors import PassError
from regauge.passes.allocation.budgets import Budgets
from regauge.passes.allocation.choices import Choice, Counts
from regauge.passes.allocation.plans import Plan

_CLOSE = 0.01  # a budget is met when it is used to within one percent
_BISECTIONS = 40
_GAIN = 1e-4  # of the budget, by which an exchange must be better
_MOST_EXCHANGED = 64  # Dims; the search for a closer fit tries each of them


def allocate(choices: Sequence[Choice], plan: Plan, budgets: Budgets, what: str) -> Counts:
    """Counts that meet all budgets and, where single indices are that fine, use the tightest to within 1 %.

    An index that costs nothing of any budget is kept: for the peak of memory only the Dims alive then matter. The
    budgets are left with the sizes that are returned. Raises PassError, naming a budget that even the smallest counts
    exceed. Time grows with the number of Dims times the logarithm of their sizes, and with the size of the graph.
    """
    everything = {choice.dim: choice.size for choice in choices}
    if budgets.set_sizes(everything) <= 1:
        return everything
    least = {choice.dim: choice.least for choice in choices}
    if budgets.set_sizes(least) > 1:
        raise PassError(_unmet(budgets, what))
    fits, exceeds = _bisect(plan, budgets, least)
    budgets.set_sizes(fits)
    _give_back(choices, budgets, fits, exceeds)
    if budgets.total < 1 - _CLOSE:
        _give_back(choices, budgets, fits, everything)
    if budgets.total < 1 - _CLOSE and len(choices) <= _MOST_EXCHANGED:
        fits = _exchange(choices, budgets, fits, everything)
    _keep_what_is_free(choices, budgets, fits)
    return fits


def fill(choices: Sequence[Choice], budgets: Budgets, counts: Counts) -> Counts:
    """Counts that are nowhere less than some that meet the budgets: those with the best scores grow while they fit."""
    found = dict(counts)
    budgets.set_sizes(found)
    _give_back(choices, budgets, found, {choice.dim: choice.size for choice in choices})
    _keep_what_is_free(choices, budgets, found)
    return found


def coarseness(choices: Sequence[Choice], budgets: Budgets, counts: Counts) -> str | None:
    """Why counts use no budget to within 1 %, in words for the user; None where they do, or nothing had to go."""
    steps = [
        budgets.with_size(choice.dim, choice.above(counts[choice.dim]))
        for choice in choices
        if counts[choice.dim] < choice.size
    ]
    if not steps or budgets.set_sizes(counts) >= 1 - _CLOSE:
        return None
    return (
        f"single indices are coarse: {budgets.total:.1%} of what is asked in {budgets.tightest.name} is used, and with "
        f"one more index of any Dim at least {min(steps):.1%}"
    )


def _unmet(budgets: Budgets, what: str) -> str:
    worst = budgets.tightest
    left, original, wanted = (worst.show(n) for n in (worst.meter.total, worst.meter.original, worst.target))
    return (
        f"{what} cannot be met: with every Dim as small as it may be, {left} of {original} in {worst.name} are left, "
        f"and {wanted} are wanted; raise that budget, exclude less, or lower minimum or round_to"
    )


def _keep_what_is_free(choices: Sequence[Choice], budgets: Budgets, counts: Counts) -> None:
    """Raise counts as far as that costs nothing of the tightest budget, and no other is exceeded."""
    allowed = max(budgets.total, 1 - _CLOSE / 10)
    for choice in choices:
        low, high = counts[choice.dim], choice.size
        if low == high or budgets.with_size(choice.dim, choice.above(low)) > allowed:
            continue
        while low < high:  # the greatest count that fits
            middle = choice.above((low + high) // 2) if choice.above(low) < high else high
            if budgets.with_size(choice.dim, middle) <= allowed:
                low = middle
            else:
                high = max(low, min(choice.below(middle), middle - 1))
        counts[choice.dim] = low
        budgets.set_sizes({choice.dim: low})


def _exchange(choices: Sequence[Choice], budgets: Budgets, counts: Counts, most: Mapping[Dim, int]) -> Counts:
    """Closer counts for a graph of few Dims, whose single indices are too coarse: lower one Dim, raise the others."""
    best, used, improved = dict(counts), budgets.total, True
    while improved and used < 1 - _CLOSE:
        improved, start = False, dict(best)
        for choice in choices:
            lower = choice.below(start[choice.dim])
            if lower == start[choice.dim]:
                continue
            trial = {**start, choice.dim: lower}
            budgets.set_sizes(trial)
            _give_back(choices, budgets, trial, {**most, choice.dim: lower})
            if budgets.total > used + _GAIN:
                best, used, improved = trial, budgets.total, True
    budgets.set_sizes(best)
    return best


def _bisect(plan: Plan, budgets: Budgets, least: Counts) -> tuple[Counts, Counts]:
    """Counts of the plan just below and just above the target."""
    low, high = 0.0, 1.0
    fits, exceeds = dict(least), plan(0.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        counts = plan(middle)
        if budgets.set_sizes(counts) <= 1:
            high, fits = middle, counts
            if budgets.total >= 1 - _CLOSE / 4:
                break
        else:
            low, exceeds = middle, counts
        if fits == exceeds:
            break
    return fits, exceeds


def _give_back(choices: Sequence[Choice], budgets: Budgets, counts: Counts, most: Mapping[Dim, int]) -> None:
    """Raise counts towards ``most``, the best scores first, as long as the cost stays within the target."""
    ranks = {choice.dim: np.sort(choice.scores)[::-1] for choice in choices}
    queue = [
        (-float(ranks[choice.dim][counts[choice.dim]]), place)
        for place, choice in enumerate(choices)
        if counts[choice.dim] < min(most[choice.dim], choice.size)
    ]
    heapq.heapify(queue)
    while queue and budgets.total < 1 - _CLOSE / 10:
        _, place = heapq.heappop(queue)
        choice = choices[place]
        wider = choice.above(counts[choice.dim])
        if wider > most[choice.dim] or budgets.with_size(choice.dim, wider) > 1:
            continue  # costs only grow from here on, so what does not fit now never will
        budgets.set_sizes({choice.dim: wider})
        counts[choice.dim] = wider
        if wider < min(most[choice.dim], choice.size):
            heapq.heappush(queue, (-float(ranks[choice.dim][wider]), place))
