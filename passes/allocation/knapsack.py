"""The multiple-choice knapsack: one count for every Dim, so that the losses add up to least within a budget.

    f_l(b) = min over counts k of  f_{l-1}(b - cost_l(k)) + loss_l(k)

(dynamic programming over the Dims l and a budget b in at most :data:`BINS` bins; layer-adaptive pruning by rate and
distortion, Xu et al. 2023, section 3.2: RD_PRUNE, there with weights and output distortion). The cost of a layer is a
product of the counts of its Dims, so costs are those of a change of one Dim where all others have the counts found
before, and the table is made anew from there until nothing improves. Of several budgets the costs are added with
Lagrange multipliers, which grow where a budget is exceeded or tightest, and shrink where there is room.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from regauge.ir.dims.extents import Dim
from regauge.passes.allocation.budgets import Budgets
from regauge.passes.allocation.choices import Choice, Counts
from regauge.passes.allocation.fit import allocate, fill
from regauge.passes.allocation.plans import Plan, uniform_plan

BINS = 4096
_ROUNDS = 4  # linearisations of the costs
_MOST_OPTIONS = 32  # counts per Dim that are weighed
_MOST_PRICED = 12  # of these, at which costs are asked for: between them they are linear, or nearly
_MOST_PROBED = 64  # Dims; of more, fewer starts are tried
_HUBS, _HUB_SHARES = 3, (1.0, 0.85, 0.7, 0.55, 0.4)
_RATE = 4.0  # of the multipliers


@dataclass(frozen=True)
class Curve:
    """What it costs in quality to keep so many indices of a Dim: counts rise, losses fall; the last keeps all."""

    counts: np.ndarray
    losses: np.ndarray

    def loss(self, count: int) -> float:
        """The loss at a count, linear between those that are known."""
        return float(np.interp(count, self.counts, self.losses))


def score_curve(choice: Choice) -> Curve:
    """The curve of scores that add up: the lowest go first."""
    gone = np.concatenate([[0.0], np.cumsum(np.sort(choice.scores))])
    return Curve(np.arange(choice.size + 1), gone[::-1].copy())


def options(choice: Choice) -> np.ndarray:
    """The allowed counts of a choice, thinned out evenly where there are many; the least and all are among them."""
    counts = [choice.least]
    while counts[-1] < choice.size:
        counts.append(choice.above(counts[-1]))
    if len(counts) > _MOST_OPTIONS:
        counts = [counts[round(i)] for i in np.linspace(0, len(counts) - 1, _MOST_OPTIONS)]
    return np.array(counts, dtype=np.int64)


def _fixed(choice: Choice, share: float) -> Choice:
    """A choice of which a share is kept, no more and no less."""
    count = choice.rounded(share * choice.size)
    return replace(choice, scores=np.sort(choice.scores)[::-1][:count], floor=count)


class Table:
    """The solved recursion: the best option of every item, for each budget from 0 to ``bins``.

    ``costs`` are whole numbers of bins, the least of an item 0 or more; time and memory: items x options x bins.
    """

    def __init__(self, costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], bins: int) -> None:
        self.costs, self.bins = [np.asarray(cost, dtype=np.int64) for cost in costs], bins
        self.least = np.zeros(bins + 1)  # the least loss of the items so far, for each budget
        self._chosen: list[np.ndarray] = []
        for cost, loss in zip(self.costs, losses, strict=True):
            self._add(cost, np.asarray(loss, dtype=np.float64))

    def _add(self, costs: np.ndarray, losses: np.ndarray) -> None:
        best = np.full(self.bins + 1, np.inf)
        chosen = np.full(self.bins + 1, -1, dtype=np.int32)
        for option, (cost, loss) in enumerate(zip(costs.tolist(), losses.tolist(), strict=True)):
            if cost > self.bins:
                continue
            trial = np.full(self.bins + 1, np.inf)
            trial[cost:] = self.least[: self.bins + 1 - cost] + loss
            better = trial < best
            best[better], chosen[better] = trial[better], option
        self.least = best
        self._chosen.append(chosen)

    def solution(self, budget: int) -> list[int] | None:
        """The option of every item that gives the least loss at a budget; None where no choice fits."""
        if not np.isfinite(self.least[budget]):
            return None
        found = []
        for chosen, cost in zip(reversed(self._chosen), reversed(self.costs), strict=True):
            option = int(chosen[budget])
            found.append(option)
            budget -= int(cost[option])
        return found[::-1]


class Knapsack:
    """Counts of least loss within budgets, for Dims whose losses are curves of their own and add up."""

    def __init__(
        self, choices: Sequence[Choice], curves: Mapping[Dim, Curve], budgets: Budgets, what: str = "the budget"
    ) -> None:
        self.choices, self.curves, self.budgets, self.what = list(choices), curves, budgets, what

    def loss(self, counts: Counts) -> float:
        return sum(self.curves[choice.dim].loss(counts[choice.dim]) for choice in self.choices)

    def solve(self, near: Counts | None = None) -> Counts:
        """The best counts found; raises PassError naming a budget that the smallest counts exceed.

        ``near``, counts that were best for nearly the same budgets, saves most of the search.
        """
        uniform = self._uniform(self.choices)
        whole = {choice.dim: choice.size for choice in self.choices}
        found = [uniform] if near else [uniform, *self._beside(whole)]
        starts = [near] if near else [uniform, whole, min(found, key=self.loss)]
        found += [self._improved(self.choices, start) for start in starts]
        best = min(found, key=self.loss)
        equal = np.ones(len(self.budgets.budgets)) / len(self.budgets.budgets)
        return fill(self._linearised(self.choices, best, equal)[1], self.budgets, best)

    def _uniform(self, choices: Sequence[Choice]) -> Counts:
        return allocate(choices, uniform_plan(choices), self.budgets, self.what)

    def _beside(self, whole: Counts) -> Iterator[Counts]:
        """More counts to start from, since products of counts have several local optima.

        Of the Dims on which the costs hang most (the widths of residual streams) each of several counts is held, and
        the others are chosen.
        """
        if not 1 < len(self.choices) <= _MOST_PROBED:
            return
        self.budgets.set_sizes(whole)
        hubs = sorted(self.choices, key=lambda choice: self.budgets.with_size(choice.dim, choice.least))[:_HUBS]
        for hub in hubs:
            for share in _HUB_SHARES:
                choices = [choice if choice is not hub else _fixed(hub, share) for choice in self.choices]
                if self.budgets.set_sizes({choice.dim: choice.least for choice in choices}) <= 1:
                    yield self._improved(choices, self._uniform(choices), rounds=1)

    def _improved(self, choices: Sequence[Choice], current: Counts, rounds: int = _ROUNDS) -> Counts:
        """The best of the tables that are made one from the other, the first around the counts given."""
        found: list[Counts] = []
        multipliers = np.ones(len(self.budgets.budgets)) / len(self.budgets.budgets)
        for _ in range(rounds):
            plan, priced = self._linearised(choices, current, multipliers)
            current = allocate(priced, plan, self.budgets, self.what)
            if current in found:
                break
            found.append(current)
            loads = np.array([budget.load for budget in self.budgets])
            multipliers = multipliers * np.exp(_RATE * (loads - loads.max()))
            multipliers /= multipliers.sum()
        return min(found, key=self.loss)

    def _linearised(
        self, choices: Sequence[Choice], counts: Counts, multipliers: np.ndarray
    ) -> tuple[Plan, list[Choice]]:
        """A plan by the table where costs are those around some counts; the choices, scored by loss per cost."""
        self.budgets.set_sizes(counts)
        allowed = [options(choice) for choice in choices]
        costs = [self._costs(choice, own, multipliers) for choice, own in zip(choices, allowed, strict=True)]
        curves = [self.curves[choice.dim] for choice in choices]
        losses = [np.interp(own, curve.counts, curve.losses) for curve, own in zip(curves, allowed, strict=True)]
        unit = sum(float(cost[-1]) for cost in costs) / BINS or 1.0
        table = Table([np.round(cost / unit).astype(np.int64) for cost in costs], losses, BINS)

        def plan(level: float) -> Counts:
            if level <= 0:
                return {choice.dim: choice.size for choice in choices}
            chosen = table.solution(round((1 - level) * BINS))
            assert chosen is not None  # the least of every item costs nothing
            picked = zip(choices, allowed, chosen, strict=True)
            return {choice.dim: int(own[option]) for choice, own, option in picked}

        priced = [
            replace(choice, scores=self._gains(choice, own, cost))
            for choice, own, cost in zip(choices, allowed, costs, strict=True)
        ]
        return plan, priced

    def _costs(self, choice: Choice, counts: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
        """What each count costs more than the least, where the other Dims are as the budgets have them."""
        asked = counts[np.unique(np.linspace(0, len(counts) - 1, _MOST_PRICED).round().astype(int))]
        shares = [
            weight * np.array([budget.load_of(budget.meter.with_size(choice.dim, int(count))) for count in asked])
            for weight, budget in zip(multipliers, self.budgets, strict=True)
        ]
        total = np.interp(counts, asked, np.maximum.accumulate(np.sum(shares, axis=0)))
        return np.asarray(total - total[0])

    def _gains(self, choice: Choice, counts: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """Scores for giving back: the loss that an index saves per cost, high ones first, in any order of indices."""
        every = np.arange(choice.size + 1)
        curve = self.curves[choice.dim]
        saved = -np.diff(np.interp(every, curve.counts, curve.losses))
        price = np.diff(np.interp(every, counts, costs))
        return np.asarray(np.maximum(saved, 0) / np.maximum(price, 1e-9))
