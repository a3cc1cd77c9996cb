"""The target of a structured sparsifier, and how much of it is to be reached at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from regauge.ir.cost import Metric, cost
from regauge.ir.dims.extents import Dim
from regauge.ir.dims.groups import Group
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.allocation.budgets import Budget, Budgets
from regauge.passes.allocation.choices import Choice, Counts, round_wishes, with_multiples
from regauge.passes.allocation.fit import allocate
from regauge.passes.allocation.plans import ranked_plan, ranked_wishes, uniform_plan
from regauge.passes.allocation.search import UNITS
from regauge.passes.pruning.selection import select
from regauge.passes.rounding import Rounding
from regauge.passes.training.places import normalised_dims

Scope: TypeAlias = Literal["uniform", "global"]
Alive: TypeAlias = Mapping[Dim, np.ndarray]  # for each Dim one truth per index

_BUDGETS: Mapping[str, Metric] = {"params": "parameters", "macs": "macs", "bytes": "bytes"}
_MOST_GOES = 0.9  # ranked together, a Dim still keeps a tenth of its indices: no layer vanishes


@dataclass(frozen=True, kw_only=True)
class Target:
    """The budget at the end of training, in the options of the pass ``prune``.

    Give exactly one of ``ratio`` (share of indices that goes) and ``params``, ``macs``, ``bytes`` (what is kept: a
    share, or a number such as "1.2M"). ``scope`` says if every Dim loses the same share or all are ranked together;
    None is what the method's paper does. ``include`` and ``exclude`` are globs on names of Dims and parameters.

    Dims over which something normalises (LayerNorm, a mean) are left alone: zeros among what is normalised count in
    training and are gone afterwards, so that the cut network is not the one that was trained. ``normalised=True``
    takes them too. Raises PassError for a target that cannot be met.
    """

    ratio: float | None = None
    params: float | str | None = None
    macs: float | str | None = None
    bytes: float | str | None = None
    scope: Scope | None = None
    round_to: int = 1
    minimum: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    normalised: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", *_BUDGETS) if getattr(self, name) is not None]
        if len(given) != 1:
            raise PassError(
                f"a Target has exactly one of ratio, params, macs and bytes, not {len(given)}: Target(macs=0.5)"
            )
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise PassError(f"Target(ratio={self.ratio:g}) is out of range: write a share of 0 or more and below 1")
        if given[0] in _BUDGETS:
            parse_amount(getattr(self, given[0]), given[0], UNITS[given[0]])

    @property
    def budget(self) -> str | None:
        """The name of the budget, where it is one."""
        return next((name for name in _BUDGETS if getattr(self, name) is not None), None)

    @property
    def metric(self) -> Metric | None:
        """The figure that is limited, where it is a budget."""
        return None if self.budget is None else _BUDGETS[self.budget]

    def kept(self, original: float) -> float:
        """The amount that the budget leaves of the figure that it limits."""
        assert self.budget is not None
        amount = parse_amount(getattr(self, self.budget), self.budget, UNITS[self.budget])
        return min(amount.of(original), original)

    def select(self, graph: Graph, left: Counter[str]) -> list[Group]:
        """The groups that may be cut; ``left`` counts the others by reason."""
        chosen = []
        over = set() if self.normalised else normalised_dims(graph)
        for group in select(graph.groups(), self.include, self.exclude, left):
            if group.dim in over:
                left["something normalises or averages over it: normalised=True takes it too"] += 1
            elif not any(member.parameter.kind == "parameter" for member in group.members):
                left["no trained parameter has it"] += 1
            else:
                chosen.append(group)
        return chosen


class Plan:
    """How many indices each Dim keeps when the target is reached in part; counts only fall."""

    def __init__(self, graph: Graph, groups: list[Group], target: Target, scope: Scope) -> None:
        self.graph, self.target, self.scope = graph, target, target.scope or scope
        self.dims = [group.dim for group in groups]
        self._rounding = Rounding(graph, target.round_to)
        self._cost = cost(graph)
        if not groups:
            raise PassError("no Dim of the graph may be cut: graph.groups() says why each is pinned")
        sizes = {dim: np.ones(int(dim.size)) for dim in self.dims}
        self.counts(sizes, {dim: ones > 0 for dim, ones in sizes.items()}, 1.0)

    def counts(self, scores: Mapping[Dim, np.ndarray], alive: Alive, progress: float) -> Counts:
        """Indices that each Dim keeps at a share of the way to the target, among those that are alive.

        Raises PassError where the target cannot be met.
        """
        choices = [self._choice(dim, scores[dim][alive[dim]], int(dim.size)) for dim in self.dims]
        if self.target.ratio is not None:
            return self._by_ratio(choices, self.target.ratio * progress)
        budget, metric = self.target.budget, self.target.metric
        assert budget is not None and metric is not None
        running = self._cost.running(metric)
        running.set_sizes({choice.dim: choice.size for choice in choices})
        final = min(
            parse_amount(getattr(self.target, budget), budget, UNITS[budget]).of(running.original), running.original
        )
        amount = running.original - (running.original - final) * progress
        choices = with_multiples(choices, self._rounding)
        plan = uniform_plan(choices) if self.scope == "uniform" else ranked_plan(choices)
        budgets = Budgets([Budget(budget, running, amount, UNITS[budget])])
        return allocate(choices, plan, budgets, f"Target({budget}={getattr(self.target, budget)})")

    def _by_ratio(self, choices: list[Choice], gone: float) -> Counts:
        if self.scope == "uniform":
            wanted: Mapping[Dim, float] = {choice.dim: (1 - gone) * int(choice.dim.size) for choice in choices}
        else:
            all_of_them = sum(int(choice.dim.size) for choice in choices)
            still = sum(choice.size for choice in choices)
            wanted = ranked_wishes(choices)(max(0.0, 1 - (1 - gone) * all_of_them / still))
        return {choice.dim: count for choice, count in round_wishes(choices, wanted, self._rounding)}

    def _choice(self, dim: Dim, scores: np.ndarray, size: int) -> Choice:
        floor = self.target.minimum
        if self.scope == "global":
            floor = max(floor, int(np.ceil((1 - _MOST_GOES) * size)))
        return Choice(dim, scores, min(floor, len(scores)))

    def survivors(self, scores: Mapping[Dim, np.ndarray], alive: Alive, progress: float) -> dict[Dim, np.ndarray]:
        """Which indices are alive once the lowest scores are gone; of equal ones the first stay."""
        counts = self.counts(scores, alive, progress)
        found = {}
        for dim in self.dims:
            ranked = np.argsort(-np.where(alive[dim], scores[dim], -np.inf), kind="stable")[: counts[dim]]
            found[dim] = np.zeros(int(dim.size), dtype=bool)
            found[dim][ranked] = True
        return found
