"""``prune``: remove the least important indices of every kind of Dim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from regauge.ir.cost import Metric, cost
from regauge.ir.errors import PassError
from regauge.ir.extents import Dim, leaves
from regauge.ir.graph import Graph
from regauge.ir.groups import Group
from regauge.ir.resize import resize
from regauge.passes.base import Context, Contract, Cut, Pass
from regauge.passes.budget import (
    Choice,
    Counts,
    allocate,
    parse_amount,
    ranked_plan,
    ranked_wishes,
    round_wishes,
    uniform_plan,
    uniform_wishes,
    with_multiples,
)
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.options import option
from regauge.passes.pruning.axis_sizes import axis_change
from regauge.passes.pruning.compensation import compensate
from regauge.passes.pruning.distortion import distortion_scores
from regauge.passes.pruning.scores import Criterion, Scores, batch_norm_gains, score
from regauge.passes.pruning.selection import select
from regauge.passes.rounding import Rounding

_BUDGETS: Mapping[str, Metric] = {"params": "parameters", "macs": "macs", "bytes": "bytes"}
_MOST_GOES = 0.9  # ranked together, a Dim still keeps a tenth of its indices: no layer vanishes
_RECOMPUTED = {"normalise", "reduce"}


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Remove the least important channels, widths, heads, head dims and hidden units, wherever axes are free to shrink.

    before  h = relu(conv(x, w1: f32[64,3,3,3]))    y = conv(h, w2: f32[128,64,3,3])
    after   h = relu(conv(x, w1: f32[32,3,3,3]))    y = conv(h, w2: f32[128,32,3,3])

    Every axis that must shrink with another one does: all of a Dim's members are cut at the same indices. Inputs and
    outputs of the graph keep their sizes. The result equals the original with the removed entries set to zero, except
    where something normalises over a Dim that was cut (LayerNorm, softmax, a mean): that is computed over what is kept,
    and the report says so. With data the indices go whose removal changes the outputs least, once the layers behind
    have made up for it, and these layers are refitted: the result is then nearer to the original than the masked one.

    Give exactly one of ratio, params, macs and bytes; a budget is what is kept, and is met within 1 % where single
    indices are that fine. MACs are counted with every dynamic size at its least, usually 1: where the sequence is
    dynamic they are those of one token.

    A ratio holds for each Dim, so on an axis that is a product of Dims the factors multiply: half of 4 groups of 4
    channels, 16 -> 4, is 2 groups of 2. With round_to it is the axis that stays a multiple, and a Dim of which no
    smaller size does that is left alone, which the report says.
    """

    name: ClassVar[str] = "prune"
    contract: ClassVar[Contract] = "approximate"

    ratio: float | None = option(None, "share of the indices that is removed", at_least=0, below=1)
    params: float | str | None = option(None, "parameters kept: a share (0.5) or a number (1.2M)")
    macs: float | str | None = option(None, "multiply-accumulates kept: a share or a number (300M)")
    bytes: float | str | None = option(None, "bytes of weights kept: a share or a number (5MB)")
    scope: Literal["uniform", "global"] | None = option(
        None, "the same share of every Dim, or one ranking of all; uniform, but global for budgets with distortion"
    )
    score: Criterion | None = option(
        None,
        "importance: change of the outputs on data, norms of weights, BatchNorm gains (l2 where there are none), or "
        "chance; distortion where data is given, else l2",
    )
    compensate: bool | None = option(None, "refit the layers behind cuts on data; true where data is given")
    round_to: int = option(1, "sizes of axes that are cut stay multiples of this", at_least=1)
    minimum: int = option(1, "indices that every Dim keeps", at_least=1)
    include: tuple[str, ...] = option((), "globs on names of Dims or parameters: cut nothing else")
    exclude: tuple[str, ...] = option((), "globs on names of Dims or parameters: these keep their shape")
    seed: int = option(0, "seed of score=random", at_least=0)
    limit: int | None = option(None, "cut only the first so many Dims (to find one that does harm)", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("ratio", *_BUDGETS) if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise PassError(
                f"prune takes exactly one of ratio, params, macs and bytes, but {found}: write prune{{ratio=0.5}}"
            )
        for name in _BUDGETS:
            if getattr(self, name) is not None:
                parse_amount(getattr(self, name), name)

    def call(self, graph: Graph, context: Context) -> Graph:
        groups = select(graph.groups(), self.include, self.exclude, context.left)
        batches = self._batches(graph, context)
        criterion = self.score or ("l2" if batches is None else "distortion")
        scores = self._scores(graph, groups, criterion, batches)
        if criterion == "bn":
            _note_without_batch_norm(graph, groups, context)
        by_loss = criterion == "distortion" and self.ratio is None
        uniform = self.scope == "uniform" or (self.scope is None and not by_loss)
        counts = self._counts(graph, groups, scores, uniform, context)
        cut = [group for group in groups if counts[group.dim] < group.dim.size]
        cut = cut if self.limit is None else cut[: self.limit]
        if not cut:
            return graph
        keep: dict[Dim, np.ndarray] = {group.dim: best(scores[group.dim], counts[group.dim]) for group in cut}
        context.cuts += [
            Cut(group.name, int(group.dim.size), counts[group.dim], axis_change(graph, group, keep)) for group in cut
        ]
        _note_recomputed(graph, [group.dim for group in cut], context)
        result = resize(graph, keep, by=self.name)
        if batches is not None and self.compensate is not False:
            done = compensate(graph, result, keep, batches, by=self.name)
            stayed = f"; {done.stayed} stayed, as no refit lowered their error" if done.stayed else ""
            context.note(f"layers refitted on {sum(map(examples_in, batches))} examples: {done.refitted}{stayed}")
        return result

    def _batches(self, graph: Graph, context: Context) -> list[Any] | None:
        """The calibration data, where there is any and the options want it."""
        wanted = "score=distortion" if self.score == "distortion" else "compensate" if self.compensate else ""
        if context.data is None and wanted:
            raise PassError(f"prune needs data for {wanted}: give batches, optimize(graph, passes, data=...)")
        if context.data is None or (self.score not in (None, "distortion") and self.compensate is False):
            return None
        return calibration_batches(graph, context)

    def _scores(
        self, graph: Graph, groups: Sequence[Group], criterion: Criterion, batches: Sequence[Any] | None
    ) -> Scores:
        """Scores to rank by: of distortion what is lost per unit of the budget, where there is one."""
        if criterion != "distortion" or batches is None:
            return score(graph, groups, criterion, self.seed)
        found = distortion_scores(graph, groups, batches, self.seed)
        budget = next((metric for name, metric in _BUDGETS.items() if getattr(self, name) is not None), None)
        if budget is None:
            return found
        running = cost(graph).running(budget)
        saved = {dim: running.original - running.with_size(dim, int(dim.size) - 1) for dim in found}
        return {dim: scores / max(saved[dim], 1e-12) for dim, scores in found.items()}

    def _counts(self, graph: Graph, groups: Sequence[Group], scores: Scores, uniform: bool, context: Context) -> Counts:
        choices = [self._choice(group, scores[group.dim], uniform) for group in groups]
        rounding = Rounding(graph, self.round_to)
        if self.ratio is not None:
            wishes = uniform_wishes(choices) if uniform else ranked_wishes(choices)
            decided = round_wishes(choices, wishes(self.ratio), rounding)
            self._note_stuck([choice for choice, _ in decided], context)
            return {choice.dim: count for choice, count in decided}
        choices = with_multiples(choices, rounding)
        self._note_stuck(choices, context)
        plan = uniform_plan(choices) if uniform else ranked_plan(choices)
        option_name = next(name for name in _BUDGETS if getattr(self, name) is not None)
        amount = getattr(self, option_name)
        running = cost(graph).running(_BUDGETS[option_name])
        target = parse_amount(amount, option_name).of(running.original)
        return allocate(choices, plan, running, target, str(self))

    def _note_stuck(self, choices: Sequence[Choice], context: Context) -> None:
        stuck = sum(choice.stuck for choice in choices)
        if stuck:
            context.left[f"no smaller size keeps its axes multiples of {self.round_to}"] += stuck

    def _choice(self, group: Group, scores: np.ndarray, uniform: bool) -> Choice:
        size = len(scores)
        floor = self.minimum if uniform else max(self.minimum, int(np.ceil((1 - _MOST_GOES) * size)))
        return Choice(group.dim, scores, min(floor, size))


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """The sorted indices of the ``count`` highest scores; of equals the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _note_without_batch_norm(graph: Graph, groups: Sequence[Group], context: Context) -> None:
    """Exporters fold BatchNorms away, and then there are no gains to go by."""
    without = len(groups) - len(batch_norm_gains(graph, groups))
    if without:
        context.note(f"{without} of {len(groups)} Dims have no BatchNorm and are scored by l2")


def _note_recomputed(graph: Graph, dims: Sequence[Dim], context: Context) -> None:
    """Say where the result is not the masked original: something normalises or averages over a Dim that was cut."""
    cut, found = set(dims), dict[str, set[Dim]]()
    for node, call in graph.axes.calls.items():
        for role, extent in call.roles:
            if role in _RECOMPUTED and node.op != "sum":
                found.setdefault(node.op, set()).update(dim for dim in leaves(extent) if dim in cut)
    for op, over in found.items():
        if over:
            context.note(f"{op} is computed over the kept indices of {len(over)} Dim{'s' if len(over) > 1 else ''}")
