"""``distil``: train what a pipeline left of a network to give what the network gave, without labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from regauge.ir.edit import set_weight
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter, Value
from regauge.passes.base import GIVE_DATA, Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.depth.blocks import repeated_blocks
from regauge.passes.depth.branches import residual_branches
from regauge.passes.depth.parts import Order, alike
from regauge.passes.fusing.distilling import Distillation, Free, ending_in
from regauge.passes.name_patterns import check_patterns, matches
from regauge.passes.on_floats import SPARSE
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class Distil(Pass):
    """Train the weights so that the network gives what it gave before the passes in front of this one, by gradients.

    before  y = f(x, w)     of a network that was cut, factorized or tied; it gave y0
    after   y = f(x, w')    |y - y0|^2 / |y0|^2 is less, and so are the errors between its blocks

    The graph that the pipeline began with is the teacher, and no labels are needed: outputs are compared by squares,
    which teach no worse than divergences of classes (Kim et al. 2021, arXiv 2105.08919), and with them the results of
    repeated blocks, or of layers where nothing repeats, that have the sizes that they had (Romero et al. 2015, FitNets,
    without regressors). Each step sees one batch of the data, in turn; the last one is held out where there are others.
    The outputs alone judge, as what is inside only guides: the weights are kept if the mean error of the outputs
    becomes less on that batch. Passes in front that fitted layers to data saw it, too, which speaks for what they left.
    Zeros that ``sparsify`` set stay zero; norms keep the statistics that they have. The more the batches differ, the
    better: a few photographs are best given in many crops, colours and lights.
    """

    name: ClassVar[str] = "distil"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True

    steps: int = option(200, "of gradients, a batch each", at_least=1)
    rate: float = option(
        3e-3, "of learning (Adam), at first, as a share of each weight's size; it falls to zero along a cosine", above=0
    )
    inner: float = option(1.0, "what the errors inside count, in the mean, beside those of the outputs", at_least=0)
    include: tuple[str, ...] = option((), "globs on names of parameters: train nothing else")
    exclude: tuple[str, ...] = option((), "globs on names of parameters: these stay")

    def call(self, graph: Graph, context: Context) -> Graph:
        if context.data is None:
            raise PassError(f"distil needs data: {GIVE_DATA}")
        teacher = context.original
        if teacher is None or teacher is graph:
            context.note("no pass in front of it changed the network: there is nothing to learn")
            return graph
        _check_alike(teacher, graph)
        batches = calibration_batches(graph, context)
        result = graph.copy()
        weights = {own.name: Free.of(own.tensor.detach(), _held(graph, own)) for own in self._trained(result)}
        ends = self._ends(teacher, result)
        run = Distillation(ending_in(teacher, ends.before), ending_in(result, ends.after), weights, ends.shares)
        seen, held = batches[:-1] or batches, batches[-1]
        before = ends.judged(run, held)
        run.train(seen, self.steps, self.rate)
        after = ends.judged(run, held)
        whose = "the last batch" if len(batches) > 1 else "the batch that it learned from"
        errors = f"on {whose} the error of the outputs went from {before[0]:.3g} to {after[0]:.3g}"
        if len(ends.shares) > ends.outputs:
            errors += f", of what is inside from {before[1]:.3g} to {after[1]:.3g}"
        if not after[0] < before[0]:
            context.note(f"weights stay as they were: {errors}")
            return graph
        for name, own in weights.items():
            set_weight(result, result.parameters[name], own.tensor().detach(), by=self.name)
        context.note(
            f"weights trained on {sum(map(examples_in, seen))} examples: {len(weights)}, values compared: "
            f"{len(ends.shares)}; {errors}"
        )
        return result

    def _trained(self, graph: Graph) -> list[Parameter]:
        """The parameters that gradients change."""
        every = [own for own in graph.all_parameters() if own.kind == "parameter" and own.uses and _is_real(own)]
        names = {name for own in every for name in own.names}
        for option_name, patterns in (("include", self.include), ("exclude", self.exclude)):
            check_patterns(option_name, patterns, names)
        return [
            own
            for own in every
            if (not self.include or matches(own.names, self.include)) and not matches(own.names, self.exclude)
        ]

    def _ends(self, teacher: Graph, graph: Graph) -> _Ends:
        """What is compared: the outputs count 1 together, what is inside ``inner``."""
        outputs = [
            (own, other)
            for own, other in zip(teacher.outputs, graph.outputs, strict=True)
            if isinstance(own, Value) and isinstance(other, Value) and _is_real(own)
        ]
        if not outputs:
            raise PassError("distil compares outputs that are real numbers, and this network has none")
        inside = _inside(teacher, graph) if self.inner else []
        inside = [pair for pair in inside if pair not in outputs]
        shares = [1 / len(outputs)] * len(outputs) + [self.inner / max(1, len(inside))] * len(inside)
        pairs = [*outputs, *inside]
        return _Ends([own for own, _ in pairs], [other for _, other in pairs], shares, len(outputs))


@dataclass(frozen=True)
class _Ends:
    """Values of two graphs that are compared, the outputs first, and what each counts in training."""

    before: list[Value]
    after: list[Value]
    shares: list[float]
    outputs: int

    def judged(self, run: Distillation, batch: Any) -> tuple[float, float]:
        """The mean error of the outputs on a batch, and of what is inside."""
        with torch.no_grad():
            errors = run.errors(batch)
        return float(errors[: self.outputs].mean()), float(errors[self.outputs :].mean())


def _inside(teacher: Graph, graph: Graph) -> list[tuple[Value, Value]]:
    """Values inside the teacher with those of the same name and sizes in the other graph: results of its blocks, or of
    its layers where there are no blocks; of a layer that was replaced what is computed of its result."""
    order = Order(teacher)
    ends = [part.result for part in repeated_blocks(order, residual_branches(order, Counter()))]
    ends = ends or [node.output for node in order.nodes if node.operator.macs is not None and len(node.outputs) == 1]
    twins = {value.name: value for node in graph.nodes for value in node.outputs}
    found = dict[Value, Value]()
    for end in ends:
        behind = [value for node in end.consumers() for value in node.outputs]
        for value in [end] if end.name in twins else behind:
            twin = twins.get(value.name)
            if twin is not None and _is_real(value) and alike(value, twin):
                found[value] = twin
    return list(found.items())


def _held(graph: Graph, parameter: Parameter) -> bool:
    """Whether the zeros of a weight were set, and stay."""
    return not graph.metadata.get(SPARSE, {}).keys().isdisjoint(parameter.names)


def _is_real(value: Value) -> bool:
    return isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point


def _check_alike(teacher: Graph, graph: Graph) -> None:
    """Raise PassError where the two graphs cannot be run on the same batches and compared."""
    sides: list[tuple[str, Sequence[Any], Sequence[Any]]] = [
        ("inputs", teacher.inputs, graph.inputs),
        ("outputs", teacher.outputs, graph.outputs),
    ]
    for what, before, after in sides:
        if _signatures(before) != _signatures(after):
            raise PassError(
                f"distil compares with the graph that the pipeline began with, whose {what} were "
                f"{', '.join(_signatures(before))} and are {', '.join(_signatures(after))}: let it come before the "
                "pass that changes them"
            )


def _signatures(values: Sequence[Any]) -> list[str]:
    return [value.signature if isinstance(value, Value) else str(value) for value in values]
