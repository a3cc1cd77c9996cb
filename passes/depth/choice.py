"""Chooses the parts that go: so many, or as many as a budget asks for, at the least loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from regauge.ir.cost import Metric, figures
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.printing.tables import short
from regauge.passes.base import reasons
from regauge.passes.depth.parts import Part
from regauge.passes.depth.removal import without
from regauge.passes.depth.scores import Judge

SHORTLIST = 4  # parts that are measured again after each removal: those that were best before


@dataclass
class Goal:
    """What is to go: ``amount`` parts, or so much of a metric of the graph."""

    graph: Graph
    amount: float
    metric: Metric | None
    text: str  # of the pass, for messages
    _costs: dict[frozenset[Part], float] = field(default_factory=dict)

    def saved(self, parts: Sequence[Part]) -> float:
        """How much of the amount these parts are."""
        if self.metric is None:
            return float(len(parts))
        key = frozenset(parts)
        if key not in self._costs:
            reduced, _ = without(self.graph, parts, by="")
            before, after = figures(self.graph), figures(reduced)
            self._costs[key] = float(getattr(before, self.metric) - getattr(after, self.metric))
        return self._costs[key]

    def met(self, parts: Sequence[Part]) -> bool:
        """Whether enough is gone without these parts."""
        return self.saved(parts) >= self.amount

    def check(self, candidates: Sequence[Part], unit: str, left: Mapping[str, int]) -> None:
        """Raise PassError where not even the removal of all candidates is enough; ``left`` says why others stay."""
        outermost = without_nested(candidates)
        if self.met(outermost):
            return
        stay = ", ".join(reasons(left))
        why = f" (left alone: {stay})" if stay else ""
        if self.metric is None:
            there = f"there are {len(outermost)} that can be removed" if outermost else "none can be removed"
            raise PassError(
                f"{self.text} asks for {self.amount:g} {unit}{'es' if unit == 'branch' else 's'}, but {there}{why}"
                "; ask for fewer, or exclude less"
            )
        whole = getattr(figures(self.graph), self.metric)
        raise PassError(
            f"{self.text} cannot be met: without all {len(outermost)} parts that can be removed{why}, "
            f"{short(whole - self.saved(outermost))} of {short(whole)} are left, and {short(whole - self.amount)} are "
            f"wanted; raise the budget{', exclude less or take unit=block' if unit == 'branch' else ' or exclude less'}"
        )


Chosen: TypeAlias = list[tuple[Part, float]]  # the parts that go, and what each adds to the loss


def alone(judge: Judge, candidates: Sequence[Part], goal: Goal) -> Chosen:
    """Measure every part alone and choose those whose losses have the least sum (LAPTOP-Diff: a 0/1 knapsack)."""
    found = _knapsack(dict(zip(candidates, judge.losses([], candidates), strict=True)), goal)
    if found is None:
        raise PassError(
            f"{goal.text} finds no parts that meet it, by what each saves alone: exclude less, raise the budget, or "
            "write iterative=true"
        )
    return found


def iterated(judge: Judge, candidates: Sequence[Part], goal: Goal) -> Chosen:
    """What removing one after the other finds, or what the knapsack does, whichever loses less when all are gone."""
    first = dict(zip(candidates, judge.losses([], candidates), strict=True))
    one = _greedy(judge, first, goal)
    other = _knapsack(first, goal)
    if other is None or {part for part, _ in one} == {part for part, _ in other} or judge.criterion == "similarity":
        return one
    losses = [judge.loss([part for part, _ in chosen]) for chosen in (one, other)]
    return one if losses[0] <= losses[1] else other


def _greedy(judge: Judge, first: Mapping[Part, float], goal: Goal) -> Chosen:
    """Remove one part after the other, always the one that adds least to the loss per unit of what it saves.

    ``first`` holds the loss of each part alone. After each removal the best of the others are measured again,
    :data:`SHORTLIST` of them. Of a budget that is met by more than it asks for, parts are put back.
    """
    chosen: list[Part] = []
    added: dict[Part, float] = {}
    loss, known, candidates = 0.0, dict(first), list(first)
    while not goal.met(chosen):
        open_parts = [part for part in candidates if not any(inside(part, other) for other in chosen)]
        if not open_parts:
            break
        prices = {part: _price(known[part], goal, chosen, part) for part in open_parts}
        best = sorted(open_parts, key=lambda part: prices[part])
        if chosen:
            best = best[:SHORTLIST]
            totals = judge.losses(chosen, best)
            additive = judge.criterion == "similarity"
            known.update({p: total if additive else total - loss for p, total in zip(best, totals, strict=True)})
            best.sort(key=lambda part: _price(known[part], goal, chosen, part))
        part = best[0]
        chosen = [*(other for other in chosen if not inside(other, part)), part]
        added[part] = known[part]
        loss += known[part]
    return [(part, added[part]) for part in _given_back(chosen, added, goal)]


def _knapsack(losses: Mapping[Part, float], goal: Goal) -> Chosen | None:
    """The parts of least loss in all; None where savings do not add up to the goal, as of weights that parts share."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    parts = list(losses)
    rows = [np.array([goal.saved([part]) for part in parts])]
    least, most = [goal.amount], [np.inf if goal.metric is not None else goal.amount]
    for a, part in enumerate(parts):
        for b, other in enumerate(parts[:a]):
            if inside(part, other) or inside(other, part):
                row = np.zeros(len(parts))
                row[[a, b]] = 1
                rows, least, most = [*rows, row], [*least, -np.inf], [*most, 1]
    found = milp(
        np.maximum(list(losses.values()), 1e-12),
        integrality=np.ones(len(parts), dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(np.array(rows), least, most),
    )
    if found.x is None:
        return None
    return [(part, loss) for (part, loss), x in zip(losses.items(), found.x, strict=True) if x > 0.5]


def _price(loss: float, goal: Goal, chosen: Sequence[Part], part: Part) -> float:
    """What a part adds to the loss for each unit that it saves and that is still asked for."""
    if goal.metric is None:
        return loss
    before = goal.saved(chosen)
    gain = min(goal.saved([*chosen, part]) - before, goal.amount - before)
    if gain <= 0:
        return float("inf")
    return max(loss, 0.0) / gain


def _given_back(chosen: Sequence[Part], added: dict[Part, float], goal: Goal) -> list[Part]:
    """The parts without those that the goal is met without; the most costly are put back first."""
    kept = list(chosen)
    for part in sorted(chosen, key=lambda part: -added[part]):
        rest = [other for other in kept if other is not part]
        if goal.metric is not None and goal.met(rest):
            kept = rest
    return kept


def inside(part: Part, other: Part) -> bool:
    """Whether a part is another one or lies in it."""
    return part is other or part.nodes[-1] in other.nodes


def without_nested(parts: Sequence[Part]) -> list[Part]:
    """The parts that lie in no other one."""
    return [part for part in parts if not any(part is not other and inside(part, other) for other in parts)]
