"""From scores to counts: by which rule indices of different Dims are weighed against one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from regauge.ir.cost import Meter, cost
from regauge.ir.dims.extents import Dim
from regauge.ir.graph import Graph
from regauge.ir.memory.activations import PeakMemory
from regauge.passes.allocation.amounts import Amount, Unit
from regauge.passes.allocation.budgets import Budget, Budgets
from regauge.passes.allocation.choices import Choice, Counts
from regauge.passes.allocation.fit import allocate
from regauge.passes.allocation.knapsack import Curve, Knapsack, score_curve
from regauge.passes.allocation.plans import (
    Wishes,
    isomorphic_plan,
    isomorphic_wishes,
    ranked_plan,
    ranked_wishes,
    signatures,
    uniform_plan,
    uniform_wishes,
)

Scope: TypeAlias = Literal["uniform", "global", "isomorphic", "knapsack", "dp"]

UNITS: Mapping[str, Unit] = {"params": "count", "macs": "count", "bytes": "bytes", "peak": "bytes", "latency": "time"}
"""The options that are budgets."""


def budgets_of(graph: Graph, amounts: Mapping[str, Amount], at: Mapping[Any, int] | None = None) -> list[Budget]:
    """The budgets in params, macs, bytes and peak; dynamic sizes as ``at`` gives them, or at their least."""
    model = cost(graph, at)
    meters: dict[str, Callable[[], Meter]] = {
        "params": lambda: model.running("parameters"),
        "macs": lambda: model.running("macs"),
        "bytes": lambda: model.running("bytes"),
        "peak": lambda: PeakMemory(model),
    }
    found = []
    for name, amount in amounts.items():
        meter = meters[name]()
        found.append(Budget(name, meter, amount.of(meter.original), UNITS[name]))
    return found


@dataclass(frozen=True)
class Search:
    """How the counts of some Dims are chosen.

    ``scope``: the same share of every Dim, one ranking of all indices, one of each class of Dims that are alike, or the
    knapsack, with scores that add up or with losses that were measured (``curves``). Where scores are losses, one
    ranking of all weighs them against what an index saves (``losses``).
    """

    graph: Graph
    choices: Sequence[Choice]
    scope: Scope
    what: str
    losses: bool = False
    curves: Mapping[Dim, Curve] | None = None

    def wishes(self) -> Wishes:
        """What a ratio asks for, count by count; not of the knapsack, which chooses all together."""
        if self.scope == "uniform":
            return uniform_wishes(self.choices)
        if self.scope == "isomorphic":
            return isomorphic_wishes(self.choices, signatures(self.graph, [c.dim for c in self.choices]))
        return ranked_wishes(self.choices)

    def counts(self, budgets: Budgets, near: Counts | None = None) -> Counts:
        """The counts within the budgets, ``near`` those of nearly the same; PassError names one that cannot be met."""
        if self.scope in ("knapsack", "dp"):
            curves = self.curves or {choice.dim: score_curve(choice) for choice in self.choices}
            return Knapsack(self.choices, curves, budgets, self.what).solve(near)
        if self.scope == "uniform":
            return allocate(self.choices, uniform_plan(self.choices), budgets, self.what)
        if self.scope == "isomorphic":
            classes = signatures(self.graph, [choice.dim for choice in self.choices])
            return allocate(self.choices, isomorphic_plan(self.choices, classes), budgets, self.what)
        choices = [_per_cost(choice, budgets) for choice in self.choices] if self.losses else self.choices
        return allocate(choices, ranked_plan(choices), budgets, self.what)


def _per_cost(choice: Choice, budgets: Budgets) -> Choice:
    """A choice with what is lost per unit of the budgets: of each Dim half is taken, since costs may fall in steps."""
    half = choice.size // 2
    saved = sum(
        budget.load_of(budget.meter.original) - budget.load_of(budget.meter.with_size(choice.dim, half))
        for budget in budgets
        if budget.meter.original > budget.target
    )
    price: float = max(saved / max(choice.size - half, 1), 1e-12)
    return replace(choice, scores=np.asarray(choice.scores / price))
