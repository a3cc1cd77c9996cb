"""``prune``: remove the least important indices of every kind of Dim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.groups import Group
from regauge.ir.dims.kept import Keep, KeptWithin
from regauge.ir.dims.majors import majors_of
from regauge.ir.dims.resize import resize
from regauge.ir.errors import PassError, RegaugeError
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import Interpreter
from regauge.passes.allocation.amounts import Amount, parse_amount
from regauge.passes.allocation.budgets import Budget, Budgets, IndexCount
from regauge.passes.allocation.choices import Choice, Counts, round_wishes, with_multiples
from regauge.passes.allocation.fit import coarseness
from regauge.passes.allocation.latency import LatencySearch, device_of
from regauge.passes.allocation.search import UNITS, Scope, Search, budgets_of
from regauge.passes.base import Context, Contract, Cut, Pass
from regauge.passes.calibration.batches import calibration_batches, check_examples, examples_in
from regauge.passes.calibration.generated import STEPS, generated_batches, statistics_in
from regauge.passes.calibration.losses import Labelled, labelled_batches
from regauge.passes.options import option
from regauge.passes.pruning.axis_sizes import axis_change
from regauge.passes.pruning.closed_form import CLOSED_FORMS, ClosedForm, take_over
from regauge.passes.pruning.compensation import compensate
from regauge.passes.pruning.held_out import Attempt, judge, move
from regauge.passes.pruning.preserve import note_recomputed, preserve
from regauge.passes.pruning.rate_distortion import measured_curves
from regauge.passes.pruning.readers import lost_in
from regauge.passes.pruning.reestimate import reestimate
from regauge.passes.pruning.score_table import SCORES, criterion, score
from regauge.passes.pruning.scores import Normalise, Reduce, Scores, profile
from regauge.passes.pruning.selection import best, kept, select
from regauge.passes.rounding import Rounding

_MOST_GOES = 0.9  # ranked together, a Dim still keeps a tenth of its indices: no layer vanishes
_EXAMPLE = "write prune{ratio=0.5} or prune{params=0.6,macs=0.7}"


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Remove the least important channels, widths, heads, head dims and hidden units, wherever axes are free to shrink.

    before  h = relu(conv(x, w1: f32[64,3,3,3]))    y = conv(h, w2: f32[128,64,3,3])
    after   h = relu(conv(x, w1: f32[32,3,3,3]))    y = conv(h, w2: f32[128,32,3,3])

    Every axis that must shrink with another one does: all of a Dim's members are cut at the same indices. Inputs and
    outputs of the graph keep their sizes. With compensate=false the result equals the original with the removed entries
    set to zero, except where something normalises over a Dim that was cut (LayerNorm, softmax, a mean): that is
    computed over what is kept, and the report says so; preserve=true folds the difference of means and RMSNorms away.

    What lies within heads, groups or experts, as a head size does, is cut in each of these by itself: all keep the same
    number of indices, each its own. Where all of them read one table or gain over it, as rotary positions are, the
    indices are the same in all, and with separate=false always.

    With data the indices go whose removal changes the outputs least, once the layers behind have made up for it, and
    these layers are refitted: the result is then nearer to the original than the masked one. Without data the same is
    done on inputs that are made up: images with the spectra and edges of natural ones, noise, any numbers of tables;
    half of them are matched to the statistics of batch norms in inference, where there are any (15 steps of 192 images
    forth and back). A score that is given is taken as it is: without data, one that needs none only removes indices.
    Where examples are few (256 vectors of outputs), or refits do not halve what the cut changes, parts of the data
    judge what is cut and refitted by the others: the share of the refits is taken that changes the outputs least on
    examples not seen, or what is cut without data, should that be nearer; compensate=true takes refits as they are.
    compensate=moments or udfc runs nothing: layers whose inputs come from others through batch norms and activations
    alone take over what they lose from channels that are kept; what else reads a cut is counted.

    Give a ratio, or one or more budgets: of several all are met. A budget is what is kept, and is met within 1 % where
    single indices are that fine. MACs and peak memory are counted with every dynamic size at its least, usually 1:
    where the sequence is dynamic they are those of one token. The peak is that of one run in the graph's order, values
    freed at last use. Latency is measured on one thread, on the first batch of the data or on made-up inputs, in
    onnxruntime of graphs loaded from ONNX, else as an emitted torch module: a model of the device is calibrated to
    that, what it finds is measured, and corrected until the budget is met within 1 % or as near as noise allows. With
    measure=false the model of ``device`` is taken at its word.

    A ratio holds for each Dim, so on an axis that is a product of Dims the factors multiply: half of 4 groups of 4
    channels, 16 -> 4, is 2 groups of 2. With round_to it is the axis that stays a multiple, and a Dim of which no
    smaller size does that is left alone, which the report says.
    """

    name: ClassVar[str] = "prune"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True

    ratio: float | None = option(None, "share of the indices that is removed", at_least=0, below=1)
    params: float | str | None = option(None, "parameters kept: a share (0.5) or a number (1.2M)")
    macs: float | str | None = option(None, "multiply-accumulates kept: a share or a number (300M)")
    bytes: float | str | None = option(None, "bytes of weights kept: a share or a number (5MB)")
    peak: float | str | None = option(None, "peak bytes of activations: a share or a number (5MB)")
    latency: float | str | None = option(None, "time of one run: a share or a time (5ms)")
    scope: Scope | None = option(
        None,
        "uniform: the same share of every Dim; global: one ranking of all indices; isomorphic: one for each class of "
        "Dims that are alike; knapsack: the best sum of scores; dp: the least sum of losses measured on data; default "
        "uniform, but knapsack for budgets with distortion",
    )
    score: str | None = option(
        None, "importance, one of the scores below; distortion where data is given or can be made up, else l2"
    )
    reduce: Reduce | None = option(None, "how what the members of a Dim say becomes one score; sum for most scores")
    normalise: Normalise | None = option(None, "what is done with scores within each Dim; each score has its own")
    loss: Any = option(None, "loss(outputs, batch) for scores that need one, in Python; else cross-entropy or |y|^2")
    compensate: bool | ClosedForm | None = option(
        None,
        "refit the layers behind cuts on data; default true where no score is given, or data is, as far as it helps on "
        "examples not seen; udfc or moments: by weights alone, without a run",
    )
    reestimate: bool = option(False, "batch norms behind cuts hold mean and variance of what they are given on data")
    examples: int | None = option(None, "inputs made up where no data is given; 32 to 384 by size", at_least=1)
    steps: int = option(STEPS, "steps in which inputs made up are fitted to the statistics of batch norms", at_least=0)
    separate: bool = option(
        True, "each head, group or expert keeps indices of its own, as many as the others; false: the same in all"
    )
    preserve: bool = option(False, "means and RMSNorms over cut Dims give what the masked original gives; no refit")
    round_to: int | Literal["device"] = option(
        1, "sizes of axes that are cut stay multiples of this; device: of the multiple that it prefers", at_least=1
    )
    device: str | Mapping[str, int | float] | None = option(
        None, "what latency is predicted for: cpu, gpu or {flops=5e10,bandwidth=1e10,overhead=2e-6,multiple=8}"
    )
    measure: bool = option(True, "measure latency where it is a budget; false: only predict it")
    minimum: int = option(1, "indices that every Dim keeps", at_least=1)
    include: tuple[str, ...] = option((), "globs on names of Dims or parameters: cut nothing else")
    exclude: tuple[str, ...] = option((), "globs on names of Dims or parameters: these keep their shape")
    seed: int = option(0, "seed of random numbers: of score=random, and of inputs made up", at_least=0)
    limit: int | None = option(None, "cut only the first so many Dims (to find one that does harm)", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("ratio", *UNITS) if getattr(self, name) is not None]
        if not given or (self.ratio is not None and len(given) > 1):
            found = f"{' and '.join(given)} are given" if given else "none is given"
            raise PassError(f"prune takes a ratio, or budgets ({', '.join(UNITS)}), but {found}: {_EXAMPLE}")
        self._amounts()
        device_of(self.device)
        if self.score is not None:
            criterion(self.score)
        other = "compensate" if self.compensate else "reestimate" if self.reestimate else None
        if self.preserve and other:
            raise PassError(f"prune takes preserve or {other}, not both: what is refitted is not the masked original")
        if self.loss is not None and not callable(self.loss):
            raise PassError("option 'loss' of prune must be a function, loss(outputs, batch)")
        if self.loss is not None and (self.score is None or criterion(self.score).needs != "loss"):
            raise PassError("option 'loss' of prune is for scores that need one: give score, such as taylor")
        if self.device is not None and self.latency is None and self.round_to != "device":
            raise PassError("option 'device' of prune is for latency or round_to=device: give one of them")

    @classmethod
    def details(cls) -> list[tuple[str, str]]:
        return [(f"score={name}", f"{entry.help}; needs {entry.needs}") for name, entry in SCORES.items()]

    def wants_floats(self, context: Context) -> bool:
        """Unless nothing is refitted or measured on data, or a number of bytes is the budget, which is one of what is
        stored."""
        stored = self._amounts().get("bytes")
        by_data = context.data is not None and self.score is None or self._needs_data
        return (self.compensate is not False or by_data) and (stored is None or stored.relative)

    @property
    def _refits(self) -> bool:
        return self.compensate in (None, True) and not self.preserve

    @property
    def _needs_data(self) -> bool:
        return (
            self.scope == "dp"
            or self.reestimate
            or (self.score is not None and criterion(self.score).needs != "nothing")
        )

    def _amounts(self) -> dict[str, Amount]:
        """The budgets that are given."""
        given = {name: getattr(self, name) for name in UNITS}
        return {name: parse_amount(value, name, UNITS[name]) for name, value in given.items() if value is not None}

    def call(self, graph: Graph, context: Context) -> Graph:
        if context.data is not None and (self.examples is not None or self.steps != STEPS):
            context.note("examples and steps are of inputs made up: there are none, since data is given")
        if context.data is None and (self._refits or self._needs_data):
            made_up = self._data_free(graph, context)
            return self._cut(graph, context).refitted if made_up is None else made_up
        return self._with_data(graph, context)

    def _with_data(self, graph: Graph, context: Context) -> Graph:
        """The result by data; where it is in doubt whether that helps, as far as examples not seen say so."""
        tried = _anew(context)
        attempt = self._cut(graph, tried)
        result, judged = attempt.refitted, None
        asked = self.compensate is not None or self.reestimate  # what is asked for stays
        if context.data is not None and self._refits and not asked and result is not graph:
            given = list(context.batches())
            judged = judge(graph, attempt, given, lambda part: self._cut(graph, _anew(context, part), attempt.counts))
        if judged is not None:
            move(result, attempt.cut, judged.share, by=self.name)
            tried.note(f"on examples not seen it was best to take {judged.share:.0%} of each refit")
            chosen = self.score is not None or self.latency is not None  # a latency would be measured anew for each
            for other in () if chosen else (self, replace(self, score="l2", compensate=False)):
                without = Context(measure=context.measure)
                plain = other.call(graph, without)
                change = judged.all.change(graph=plain)
                if change < judged.change:
                    without.note("on examples not seen that is nearer to the original than what is cut by these data")
                    result, tried, judged = plain, without, replace(judged, change=change)
        context.cuts += tried.cuts
        context.notes += tried.notes
        context.left += tried.left
        return result

    def _data_free(self, graph: Graph, context: Context) -> Graph | None:
        """The result with inputs that are made up: where that is asked for, and where no score says otherwise."""
        asked = self.compensate is True or self._needs_data
        if not asked and (self.score is not None or self.ratio == 0):
            return None
        if not asked and self.latency is None:  # a first try tells at once what cannot be done, and if anything is
            first = Context()
            if self._cut(graph, first).cut is graph:
                context.left = first.left
                return graph
        trial = Context(measure=context.measure, made_up=True)
        try:
            trial.data = generated_batches(graph, examples=self.examples, steps=self.steps, seed=self.seed)
            trial.note(_made_up(graph, trial.data))
            result = self._cut(graph, trial).refitted
        except (RegaugeError, RuntimeError) as reason:  # autograd and solvers raise the latter
            if asked:
                raise
            context.note(f"nothing is refitted on inputs made up, which failed: {str(reason).splitlines()[0]}")
            return None
        context.cuts, context.left = trial.cuts, trial.left
        context.notes += trial.notes if result is not graph else []
        return result

    def _cut(self, graph: Graph, context: Context, counts: Counts | None = None) -> Attempt:
        """The result, with these counts where they are given."""
        groups = select(graph.groups(), self.include, self.exclude, context.left)
        if self.separate:
            majors = majors_of(graph, [group.dim for group in groups])
            groups = [replace(group, majors=majors[group.dim]) for group in groups]
        if counts is not None:
            groups = [group for group in groups if counts[group.dim] < group.dim.size]
        batches = self._batches(graph, context)
        name = self.score or ("l2" if batches is None else "distortion")
        scores = score(
            graph, groups, name, self.seed, batches=batches or (), loss=self.loss, reduce=self.reduce,
            normalise=self.normalise, notes=context.notes, counts=counts,
        )  # fmt: skip
        inputs = None if batches is None else [batch.inputs for batch in batches]
        counts = counts or self._counts(graph, groups, scores, name, inputs, context)
        cut = [group for group in groups if counts[group.dim] < group.dim.size]
        cut = cut if self.limit is None else cut[: self.limit]
        if not cut:
            return Attempt(graph, graph, counts)
        keep = {group.dim: kept(group, scores[group.dim], counts[group.dim]) for group in cut}
        note_recomputed(graph, [group.dim for group in cut], self.preserve, context)
        apart = sum(isinstance(indices, KeptWithin) for indices in keep.values())
        if apart:
            context.note(f"Dims that keep other indices in each head, group or expert: {apart}")
        result = resize(graph, keep, by=self.name)
        if self.preserve:
            context.note(f"means and norms kept what they were: {preserve(graph, result, by=self.name)}")
        before = result.copy()
        lost = self._repair(graph, result, keep, inputs, context)
        for group in cut:
            sizes = int(group.dim.size), counts[group.dim]
            context.cuts.append(Cut(group.name, *sizes, axis_change(graph, group, keep), lost.get(group.dim, ())))
        return Attempt(before, result, counts)

    def _repair(
        self, graph: Graph, result: Graph, keep: Keep, inputs: Sequence[Any] | None, context: Context
    ) -> dict[Dim, tuple[str, ...]]:
        """Let what is left make up for what was cut, as far as the options want it; returns by Dim why it does not."""
        lost: dict[Dim, tuple[str, ...]] = {}
        examples = sum(map(examples_in, inputs or ()))
        if self.compensate in CLOSED_FORMS:
            form: ClosedForm = self.compensate  # type: ignore[assignment]
            taken = take_over(graph, result, keep, form=form, by=self.name)
            context.note(f"layers that take over what was removed, by weights alone ({form}): {taken.layers}")
            for dim, reasons in taken.left.items():
                context.left.update(f"no layer takes over from its kept indices: {reason}" for reason in reasons)
                lost[dim] = tuple(reasons)
        elif inputs is not None and self._refits:
            done = compensate(graph, result, keep, inputs, by=self.name)
            stayed = f"; {done.stayed} stayed, as no refit lowered their error" if done.stayed else ""
            context.note(f"layers refitted on {examples} examples: {done.refitted}{stayed}")
            lost = lost_in(graph, keep, done.nodes)
        if inputs is not None and self.reestimate:
            norms = reestimate(graph, result, keep, inputs, context.left, by=self.name)
            context.note(f"batch norms with statistics of {examples} examples: {norms}")
        return lost

    def _batches(self, graph: Graph, context: Context) -> list[Labelled] | None:
        """The calibration data, where there is any and the options want it."""
        unused = self.score is not None and not self._needs_data and not self._refits
        if context.data is None or unused:
            return None
        batches = labelled_batches(graph, context)
        check_examples([batch.inputs for batch in batches])
        return batches

    def _counts(
        self,
        graph: Graph,
        groups: Sequence[Group],
        scores: Scores,
        name: str,
        batches: Sequence[Any] | None,
        context: Context,
    ) -> Counts:
        losses = name == "distortion" and self.ratio is None
        scope: Scope = self.scope or ("knapsack" if losses else "uniform")
        choices = [self._choice(group, scores[group.dim], scope == "uniform") for group in groups]
        multiple = device_of(self.device).multiple if self.round_to == "device" else self.round_to
        rounding = Rounding(graph, multiple)
        search = Search(graph, with_multiples(choices, rounding), scope, str(self), losses)
        if scope == "dp":
            refits = self.compensate in (None, True)
            curves = measured_curves(graph, search.choices, scores, batches or [], refit=refits)
            search = replace(search, curves=curves)
        if self.ratio is not None and scope not in ("knapsack", "dp"):
            decided = round_wishes(choices, replace(search, choices=choices).wishes()(self.ratio), rounding)
            self._note_stuck([choice for choice, _ in decided], multiple, context)
            return {choice.dim: count for choice, count in decided}
        self._note_stuck(search.choices, multiple, context)
        return self._within(graph, search, scores, batches, context)

    def _within(
        self, graph: Graph, search: Search, scores: Scores, batches: Sequence[Any] | None, context: Context
    ) -> Counts:
        """Counts within the budgets, and a note of what each of them is then."""
        amounts = self._amounts()
        latency = amounts.pop("latency", None)
        others = budgets_of(graph, amounts)
        if self.ratio is not None:
            sizes = {choice.dim: choice.size for choice in search.choices}
            others = [Budget("indices", IndexCount(sizes), (1 - self.ratio) * sum(sizes.values()))]
        if latency is None:
            budgets, told = Budgets(others), ""
            counts = search.counts(budgets)
        else:
            timed = LatencySearch(search, others, latency, device_of(self.device), lambda c: _cut(graph, scores, c))
            if self.measure and context.measure is not None:
                timed.measure, timed.inputs = context.measure, _first(graph, batches, context)
                timed.at = None if timed.inputs is None else Interpreter(graph).bound(timed.inputs)[1]
            counts, budgets, told = timed.run()
        for budget in budgets:
            context.note(told if budget.name == "latency" else str(budget))
        coarse = None if latency else coarseness(search.choices, budgets, counts)
        if coarse:
            context.note(coarse)
        return counts

    def _note_stuck(self, choices: Sequence[Choice], multiple: int, context: Context) -> None:
        small = sum(choice.size <= self.minimum for choice in choices)
        if small:
            context.left[f"it has no more than the minimum of {self.minimum} indices"] += small
        stuck = sum(choice.stuck for choice in choices)
        if stuck:
            context.left[f"no smaller size keeps its axes multiples of {multiple}"] += stuck

    def _choice(self, group: Group, scores: np.ndarray, uniform: bool) -> Choice:
        scores = profile(scores)
        size = len(scores)
        floor = self.minimum if uniform else max(self.minimum, int(np.ceil((1 - _MOST_GOES) * size)))
        return Choice(group.dim, scores, min(floor, size))


def _anew(context: Context, data: Any = None) -> Context:
    """A context for a trial, on the same data or on a part of it."""
    return Context(data=context.data if data is None else data, measure=context.measure)


def _cut(graph: Graph, scores: Scores, counts: Counts) -> Graph:
    """The graph with these counts, as it is before anything is refitted."""
    return resize(graph, {dim: best(scores[dim], count) for dim, count in counts.items() if count < int(dim.size)})


def _first(graph: Graph, batches: Sequence[Any] | None, context: Context) -> Any:
    """The first batch of the data, where there is any, as the graph takes it."""
    if context.made_up:
        return None
    found = calibration_batches(graph, context) if batches is None and context.data is not None else batches
    return found[0] if found else None


def _made_up(graph: Graph, batches: Sequence[Any]) -> str:
    count, norms = sum(map(examples_in, batches)), len(statistics_in(graph))
    held = f"{norms} batch norm{'s' if norms > 1 else ''}"
    source = f"from the statistics of {held}" if norms else "as noise, since there is no batch norm"
    return f"no data: {count} inputs are made up {source}; compensate=false only removes indices"
