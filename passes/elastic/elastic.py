"""``elastic``: a graph whose Dims are ordered by importance, so that every prefix of them is a network.

Slimmable networks (Yu et al. 2019), Matryoshka representations (Kusupati et al. 2022) and MatFormer (Devvrit et al.
2024) nest smaller networks in the first indices of a larger one. Sorting makes the nested ones as good as they can be
without training, and a better start for it (:class:`regauge.passes.elastic.supernet.Supernet`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.groups import Group
from regauge.ir.dims.reorder import may_be_reordered, reorder
from regauge.ir.dims.resize import resize
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.allocation.budgets import Budget, Budgets
from regauge.passes.allocation.choices import Choice, round_wishes, with_multiples
from regauge.passes.allocation.fit import allocate
from regauge.passes.allocation.plans import uniform_plan
from regauge.passes.allocation.search import UNITS, budgets_of
from regauge.passes.base import Cut, reasons
from regauge.passes.name_patterns import matches
from regauge.passes.pruning.score_table import criterion, score
from regauge.passes.pruning.selection import select
from regauge.passes.report import reported
from regauge.passes.rounding import Rounding

Widths: TypeAlias = float | Mapping[str, float]
GRANULARITIES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Elastic:
    """Nested networks in one graph; make one with :func:`elastic`.

    ``graph`` computes what the original does, its elastic Dims with the most important index first; ``scores`` are
    these Dims' scores by name, falling; ``left`` counts the Dims that are not elastic, by reason.
    """

    graph: Graph
    scores: Mapping[str, np.ndarray]
    left: Mapping[str, int]
    round_to: int = 1

    def counts(self, width: Widths) -> dict[str, int]:
        """How many indices each Dim keeps at a width: the share that is kept, of all Dims or by globs on their names.

        A Dim that no glob matches keeps all; of several globs the first counts. At least one index is kept, and axes
        are rounded to multiples of ``round_to``. Raises PassError for a width out of range or a glob without a Dim.
        """
        given: Mapping[str, float] = width if isinstance(width, Mapping) else {"*": width}
        for pattern, share in given.items():
            if not 0 < share <= 1:
                raise PassError(f"the width {share:g} is out of range: write the share that is kept, above 0, up to 1")
            if not matches(self.scores, [pattern]):
                raise PassError(f"{pattern!r} matches no elastic Dim: they are {', '.join(list(self.scores)[:8])}")
        dims = self._dims()
        shares = {dims[name]: _share(name, given) for name in self.scores}
        choices = [Choice(dims[name], found) for name, found in self.scores.items()]
        wanted = {dim: share * int(dim.size) for dim, share in shares.items()}
        decided = round_wishes(choices, wanted, Rounding(self.graph, self.round_to))
        return {choice.dim.name: count for choice, count in decided}

    def at(self, width: Widths) -> Graph:
        """The nested graph of a width: every elastic Dim cut to its first indices. See :meth:`counts`."""
        return self.cut_to(self.counts(width))

    def cut_to(self, counts: Mapping[str, int]) -> Graph:
        """The nested graph whose Dims have so many indices each; its ``report`` says what each lost of its scores."""
        since, dims = time.perf_counter(), self._dims()
        keep = {name: range(count) for name, count in counts.items() if count < int(dims[name].size)}
        result = resize(self.graph, keep, by="elastic") if keep else self.graph.copy()
        cuts = [self._cut(name, len(kept)) for name, kept in keep.items()]
        return reported(self.graph, result, "elastic", since, cuts, self.left)

    def _cut(self, name: str, count: int) -> Cut:
        scores = self.scores[name]
        share = scores[count:].sum() / max(scores.sum(), 1e-300)
        return Cut(name, len(scores), count, f"{name}: {len(scores)} -> {count}, {share:.1%} of its scores")

    def uniform(
        self, *, macs: float | str | None = None, params: float | str | None = None, bytes: float | str | None = None
    ) -> dict[str, int]:
        """Counts of the widest network of one width, the same share of every Dim, that meets a budget.

        The budget is what is kept, as in ``prune``; single indices are added until it is used. For :meth:`cut_to`.
        Raises PassError where a budget cannot be met.
        """
        budget = _budget(self.graph, macs=macs, params=params, bytes=bytes)
        dims = self._dims()
        choices = [Choice(dims[name], found) for name, found in self.scores.items()]
        choices = with_multiples(choices, Rounding(self.graph, self.round_to))
        found = allocate(choices, uniform_plan(choices), Budgets([budget]), f"the budget in {budget.name}")
        return {dim.name: count for dim, count in found.items()}

    def mix(
        self,
        *,
        macs: float | str | None = None,
        params: float | str | None = None,
        bytes: float | str | None = None,
        granularities: Sequence[float] = GRANULARITIES,
    ) -> dict[str, int]:
        """Mix'n'Match: counts for each Dim by itself, of a few granularities, that meet a budget; for :meth:`cut_to`.

        The budget is what is kept, as in ``prune``. From the full width on, that Dim is narrowed to its next
        granularity which loses the least score per unit saved; what is left of the budget in the end widens Dims
        again. MatFormer mixes granularities that it has trained, with widths that change slowly from
        layer to layer, by hand; the greedy choice by score is ours. Mixes that no training has seen may be poor:
        :class:`regauge.training.Supernet` takes them among its widths. Raises PassError where a budget cannot be met.
        """
        budget = _budget(self.graph, macs=macs, params=params, bytes=bytes)
        steps = [self.counts(share) for share in sorted({*granularities, 1.0}, reverse=True)]
        return self._narrowed(steps, budget)

    def _narrowed(self, steps: Sequence[Mapping[str, int]], budget: Budget) -> dict[str, int]:
        dims = self._dims()
        running, target = budget.meter, budget.target
        place = dict.fromkeys(self.scores, 0)

        def rate(name: str) -> float:
            """The score lost per unit saved by the next step."""
            before, after = steps[place[name]][name], steps[place[name] + 1][name]
            saved = running.total - running.with_size(dims[name], after)
            return float(self.scores[name][after:before].sum()) / saved if saved > 0 else 0.0

        while running.total > target:
            narrower = [name for name in self.scores if place[name] + 1 < len(steps)]
            if not narrower:
                raise PassError(
                    f"{budget.name}={budget.show(target)} cannot be met: {running.total / running.original:.1%} are "
                    "left with every Dim at its smallest granularity; raise the budget or add smaller granularities"
                )
            name = min(narrower, key=rate)
            place[name] += 1
            running.set_sizes({dims[name]: steps[place[name]][name]})
        for name in sorted(self.scores, key=lambda name: -place[name]):
            while place[name] and running.with_size(dims[name], steps[place[name] - 1][name]) <= target:
                place[name] -= 1
                running.set_sizes({dims[name]: steps[place[name]][name]})
        return {name: steps[place[name]][name] for name in self.scores}

    def _dims(self) -> dict[str, Dim]:
        return {group.name: group.dim for group in self.graph.groups()}


def _budget(graph: Graph, **options: Any) -> Budget:
    given = {name: amount for name, amount in options.items() if amount is not None}
    if len(given) != 1:
        raise PassError(f"give exactly one of {', '.join(options)}, not {len(given)}: mix(macs=0.5)")
    (budget,) = budgets_of(graph, {name: parse_amount(amount, name, UNITS[name]) for name, amount in given.items()})
    return budget


def _share(name: str, given: Mapping[str, float]) -> float:
    return next((share for pattern, share in given.items() if matches([name], [pattern])), 1.0)


def elastic(
    graph: Graph,
    *,
    score_by: str | Mapping[str, Sequence[float]] = "l2",
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    round_to: int = 1,
    seed: int = 0,
) -> Elastic:
    """Order every free Dim by importance, exactly: the result computes what the graph does.

        nested = regauge.elastic(graph)
        half = nested.at(0.5)                                  # every Dim cut to its first half
        less = nested.cut_to(nested.uniform(macs=0.4))         # the same share everywhere, to a budget
        mixed = nested.cut_to(nested.mix(macs=0.4))            # layer by layer, to a budget

    ``score_by`` is a criterion of weights (l1, l2, bn, random), or scores of one's own by name of Dim; Dims without
    are not elastic. Where something normalises over a Dim, that is computed over what is kept, as ``prune`` does.
    Loaded ONNX graphs are taken like captured ones. Raises PassError where no Dim is elastic.
    """
    found = ordered(graph, score_by, include, exclude, round_to, seed)
    if not found.scores:
        why = ", ".join(reasons(found.left)) or "none has more than one index"
        raise PassError(f"no Dim of the graph is elastic: {why}")
    return found


def ordered(
    graph: Graph,
    score_by: str | Mapping[str, Sequence[float]],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    round_to: int,
    seed: int,
) -> Elastic:
    """:func:`elastic`, of a graph without elastic Dims too: it is a copy then."""
    left: Counter[str] = Counter()
    groups = select(graph.groups(), include, exclude, left)
    allowed = set(may_be_reordered(graph, [group.dim for group in groups]))
    left["its indices have an order that is read"] += sum(group.dim not in allowed for group in groups)
    chosen = [group for group in groups if group.dim in allowed]
    scores = _scores(graph, chosen, score_by, seed)
    orders = {dim: np.argsort(-found, kind="stable") for dim, found in scores.items()}
    ordered = {dim.name: found[orders[dim]] for dim, found in scores.items()}
    return Elastic(reorder(graph, orders, by="elastic"), ordered, +left, round_to)


def _scores(
    graph: Graph, groups: Sequence[Group], given: str | Mapping[str, Sequence[float]], seed: int
) -> dict[Dim, np.ndarray]:
    if not isinstance(given, Mapping):
        if criterion(given).needs != "nothing":
            raise PassError("elastic orders by weights: for scores of data give them by name of Dim")
        return score(graph, groups, given, seed)
    by_name = {group.name: group.dim for group in groups}
    found = {}
    for name, values in given.items():
        if name not in by_name:
            raise PassError(f"{name!r} is no Dim that may be elastic: they are {', '.join(list(by_name)[:8])}")
        found[by_name[name]] = np.asarray(values, dtype=np.float64)
        if found[by_name[name]].shape != (int(by_name[name].size),):
            raise PassError(f"{name} has {by_name[name].size} indices: give one score for each")
    return found
