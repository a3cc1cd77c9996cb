"""``prune``: remove the least important indices of every kind of Dim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from regauge.ir.cost import Metric, cost
from regauge.ir.errors import PassError, RegaugeError
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
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.generated import STEPS, generated_batches, statistics_in
from regauge.passes.calibration.losses import Labelled, labelled
from regauge.passes.options import option
from regauge.passes.pruning.axis_sizes import axis_change
from regauge.passes.pruning.compensation import compensate
from regauge.passes.pruning.preserve import PRESERVED, preserve
from regauge.passes.pruning.score_table import SCORES, criterion, score
from regauge.passes.pruning.scores import Normalise, Reduce, Scores
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
    outputs of the graph keep their sizes. With compensate=false the result equals the original with the removed entries
    set to zero, except where something normalises over a Dim that was cut (LayerNorm, softmax, a mean): that is
    computed over what is kept, and the report says so; preserve=true folds the difference of means and RMSNorms away.

    With data the indices go whose removal changes the outputs least, once the layers behind have made up for it, and
    these layers are refitted: the result is then nearer to the original than the masked one. Without data the same is
    done on inputs made up from the statistics of batch norms in inference, where there are any (15 steps of 192 images
    forth and back); a graph without them is only masked, unless compensate=true asks for a refit on noise. A score
    that is given is taken as it is: without data, one that needs none only removes indices.

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
    score: str | None = option(
        None, "importance, one of the scores below; distortion where data is given or can be made up, else l2"
    )
    reduce: Reduce | None = option(None, "how what the members of a Dim say becomes one score; sum for most scores")
    normalise: Normalise | None = option(None, "what is done with scores within each Dim; each score has its own")
    loss: Any = option(None, "loss(outputs, batch) for scores that need one, in Python; else cross-entropy or |y|^2")
    compensate: bool | None = option(
        None, "refit the layers behind cuts on data; true where data is given, or can be made up from batch norms"
    )
    examples: int | None = option(None, "inputs made up where no data is given; 32 to 384 by size", at_least=1)
    steps: int = option(STEPS, "steps in which inputs made up are fitted to the statistics of batch norms", at_least=0)
    preserve: bool = option(False, "means and RMSNorms over cut Dims give what the masked original gives; no refit")
    round_to: int = option(1, "sizes of axes that are cut stay multiples of this", at_least=1)
    minimum: int = option(1, "indices that every Dim keeps", at_least=1)
    include: tuple[str, ...] = option((), "globs on names of Dims or parameters: cut nothing else")
    exclude: tuple[str, ...] = option((), "globs on names of Dims or parameters: these keep their shape")
    seed: int = option(0, "seed of random numbers: of score=random, and of inputs made up", at_least=0)
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
        if self.score is not None:
            criterion(self.score)
        if self.preserve and self.compensate:
            raise PassError("prune takes preserve or compensate, not both: what is refitted is not the masked original")
        if self.loss is not None and not callable(self.loss):
            raise PassError("option 'loss' of prune must be a function, loss(outputs, batch)")

    @classmethod
    def details(cls) -> list[tuple[str, str]]:
        return [(f"score={name}", f"{entry.help}; needs {entry.needs}") for name, entry in SCORES.items()]

    @property
    def _refits(self) -> bool:
        return self.compensate is not False and not self.preserve

    @property
    def _score_needs_data(self) -> bool:
        return self.score is not None and criterion(self.score).needs != "nothing"

    def call(self, graph: Graph, context: Context) -> Graph:
        if context.data is None and (self._refits or self._score_needs_data):
            made_up = self._data_free(graph, context)
            return self._cut(graph, context) if made_up is None else made_up
        return self._cut(graph, context)

    def _data_free(self, graph: Graph, context: Context) -> Graph | None:
        """The result with inputs that are made up: where that is asked for, and where batch norms tell what to make."""
        asked = bool(self.compensate) or self._score_needs_data
        if not asked and (self.score is not None or not statistics_in(graph) or self.ratio == 0):
            return None
        if not asked:  # a first try tells at once what cannot be done, and whether there is anything to do
            first = Context()
            if replace(self, compensate=False)._cut(graph, first) is graph:
                context.left = first.left
                return graph
        trial = Context()
        try:
            trial.data = generated_batches(graph, examples=self.examples, steps=self.steps, seed=self.seed)
            trial.note(_made_up(graph, trial.data))
            result = self._cut(graph, trial)
        except (RegaugeError, RuntimeError) as reason:  # autograd and solvers raise the latter
            if asked:
                raise
            context.note(f"nothing is refitted on inputs made up, which failed: {str(reason).splitlines()[0]}")
            return None
        context.cuts, context.left = trial.cuts, trial.left
        context.notes += trial.notes if result is not graph else []
        return result

    def _cut(self, graph: Graph, context: Context) -> Graph:
        groups = select(graph.groups(), self.include, self.exclude, context.left)
        batches = self._batches(graph, context)
        name = self.score or ("l2" if batches is None else "distortion")
        scores = self._scores(graph, groups, name, batches, context)
        by_loss = name == "distortion" and self.ratio is None
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
        _note_recomputed(graph, [group.dim for group in cut], self.preserve, context)
        result = resize(graph, keep, by=self.name)
        if self.preserve:
            context.note(f"means and norms kept what they were: {preserve(graph, result, by=self.name)}")
        if batches is not None and self._refits:
            refitted = compensate(graph, result, keep, [batch.inputs for batch in batches], by=self.name)
            context.note(f"layers refitted on {_count(batches)} examples: {refitted}")
        return result

    def _batches(self, graph: Graph, context: Context) -> list[Labelled] | None:
        """The calibration data, where there is any and the options want it."""
        unused = self.score is not None and not self._score_needs_data and not self._refits
        if context.data is None or unused:
            return None
        return [labelled(graph, batch) for batch in context.batches()]

    def _scores(
        self, graph: Graph, groups: Sequence[Group], name: str, batches: Sequence[Labelled] | None, context: Context
    ) -> Scores:
        """Scores to rank by: of distortion what is lost per unit of the budget, where there is one."""
        found = score(
            graph, groups, name, self.seed, batches=batches or (), loss=self.loss, reduce=self.reduce,
            normalise=self.normalise, notes=context.notes,
        )  # fmt: skip
        budget = next((metric for name, metric in _BUDGETS.items() if getattr(self, name) is not None), None)
        if budget is None or name != "distortion":
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


def _made_up(graph: Graph, batches: Sequence[Any]) -> str:
    count, norms = sum(map(examples_in, batches)), len(statistics_in(graph))
    source = f"from the statistics of {norms} batch norms" if norms else "as noise, since there is no batch norm"
    return f"no data: {count} inputs are made up {source}; compensate=false only removes indices"


def _count(batches: Sequence[Labelled]) -> int:
    return sum(examples_in(batch.inputs) for batch in batches)


def _note_recomputed(graph: Graph, dims: Sequence[Dim], preserved: bool, context: Context) -> None:
    """Say where the result is not the masked original: something normalises or averages over a Dim that was cut."""
    cut, found = set(dims), dict[str, set[Dim]]()
    for node, call in graph.axes.calls.items():
        for role, extent in call.roles:
            if role in _RECOMPUTED and node.op != "sum" and not (preserved and node.op in PRESERVED):
                found.setdefault(node.op, set()).update(dim for dim in leaves(extent) if dim in cut)
    for op, over in found.items():
        if over:
            context.note(f"{op} is computed over the kept indices of {len(over)} Dim{'s' if len(over) > 1 else ''}")
