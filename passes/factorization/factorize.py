"""``factorize``: layers as products of smaller ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from regauge.ir.cost import figures, local_figures
from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.base import Context, Contract, Cut, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.sensitivity import output_metrics
from regauge.passes.factorization.catalog import FORMS, UNASKED
from regauge.passes.factorization.chains import Link, write_chain
from regauge.passes.factorization.forms import Choice, Form
from regauge.passes.factorization.on_data import links_on_data, problems_on_data
from regauge.passes.factorization.orders import in_blocks
from regauge.passes.factorization.problems import Problem, matrix_of
from regauge.passes.factorization.ranks import least_loss
from regauge.passes.factorization.structured import Structured
from regauge.passes.options import option

_FIGURES = {"params": "parameters", "macs": "macs"}


@dataclass(frozen=True, kw_only=True)
class Factorize(Pass):
    """Replace layers by products of smaller ones, where these have fewer parameters or multiplications.

    before  y = linear(x, w, b)                    w: f32[384,96]
    after   y = linear(linear(x, down), up, b)     down: f32[24,96], up: f32[384,24]

    Forms and ranks are chosen so that least is lost in all. With data what is kept are the directions that the outputs
    of a layer take on it, weighed by how much the outputs of the model move with them, one layer after the other, each
    with the inputs that the layers before give.
    """

    name: ClassVar[str] = "factorize"
    contract: ClassVar[Contract] = "approximate"

    params: float | str | None = option(None, "parameters kept: a share (0.5) or a number (1.2M)")
    macs: float | str | None = option(None, "multiply-accumulates kept: a share or a number (300M)")
    rank: float | None = option(
        None, "the rank of every layer instead: a number, or a share of the greatest that saves anything", above=0
    )
    form: (
        Literal[
            "low-rank",
            "tucker",
            "columns",
            "rows",
            "monarch",
            "block-dense",
            "block-diagonal",
            "btt",
            "kronecker",
            "mpo",
        ]
        | None
    ) = option(None, "what layers become; if not given, for each the best of the first four")
    permute: bool = option(True, "hidden channels are reordered where this suits the blocks of structured forms")
    multiple: int = option(1, "ranks are multiples of it", at_least=1)
    include: tuple[str, ...] = option((), "globs on names of weights: only these")
    exclude: tuple[str, ...] = option((), "globs on names of weights: not these")
    seed: int = option(0, "seed of the directions of gradients", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        budgets = [name for name in _FIGURES if getattr(self, name) is not None]
        for name in budgets:
            parse_amount(getattr(self, name), name)
        if self.rank is None and not budgets:
            raise PassError("factorize: say how small it is to become: factorize{params=0.5}, {macs=0.5} or {rank=16}")
        if self.rank is not None and budgets:
            raise PassError(f"factorize: give rank={self.rank:g} or {budgets[0]}=..., not both")
        if self.rank is not None and self.rank >= 1 and self.rank != int(self.rank):
            raise PassError(f"factorize: rank={self.rank:g} is neither a share nor a whole number")

    def call(self, graph: Graph, context: Context) -> Graph:
        layers = self._layers(graph, context.left)
        if not layers:
            return graph
        batches, metrics = None, {}
        if context.data is not None:
            batches = calibration_batches(graph, context)
            metrics = output_metrics(graph, [layer.weight.name for layer in layers], batches, self.seed)
        if batches is None:
            problems: Iterable[Problem] = (Problem(layer, matrix_of(layer)) for layer in layers)
        else:
            problems = problems_on_data(graph, layers, batches, metrics)
        picked = self._picked(graph, problems)
        context.left["it is worth more whole"] += len(layers) - len(picked)
        original = self._ordered(graph, layers, picked, context) if self.permute else graph
        if original is not graph and batches is not None:
            metrics = output_metrics(original, [layer.weight.name for layer in layers], batches, self.seed)
        result = original.copy()
        own = [layer for layer in self._layers(result, Counter()) if layer.weight.name in picked]
        if batches is None:
            found = [(layer, _links(layer, picked[layer.weight.name])) for layer in own]
        else:
            found = list(links_on_data(original, result, own, picked, batches, metrics, by=self.name))
            context.note(f"chosen on {sum(map(examples_in, batches))} examples")
        for layer, links in found:
            choice = picked[layer.weight.name]
            form = " ".join([choice.form, "x".join(map(str, choice.axes))]).strip()
            context.cuts.append(Cut(f"{layer.weight.name} ({form}): rank", _most(layer), choice.ranks[0]))
            write_chain(result, layer, links, by=self.name)
        remove_dead(result)
        return result if found else graph

    def _forms(self) -> list[Form]:
        return [FORMS[name] for name in ([self.form] if self.form is not None else UNASKED)]

    def _layers(self, graph: Graph, left: Counter[str]) -> list[Layer]:
        def misfit(layer: Layer) -> str | None:
            reasons = [form.misfit(layer) for form in self._forms()]
            return reasons[0] if all(reasons) else None

        return chosen_layers(graph, self.include, self.exclude, left, misfit)

    def _picked(self, graph: Graph, problems: Iterable[Problem]) -> dict[str, Choice]:
        """What each layer that does not stay whole becomes, by the name of its weight."""
        choices = {}
        for problem in problems:
            layer = problem.layer
            macs = local_figures([layer.node], graph).macs
            choices[layer.weight.name] = [Choice("", (), layer.outputs * layer.columns, macs, 0.0)]
            for form in self._forms():
                if form.misfit(layer) is None:
                    choices[layer.weight.name] += form.choices(problem, graph, self.multiple)
        if self.rank is not None:
            picked = {name: _nearest(own, self.rank) for name, own in choices.items()}
        else:
            picked = least_loss(choices, self._allowed(graph, choices))
        return {name: choice for name, choice in picked.items() if choice.ranks}

    def _ordered(self, graph: Graph, layers: Sequence[Layer], picked: Mapping[str, Choice], context: Context) -> Graph:
        """The graph with its hidden channels in the order that suits what is picked."""
        found = []
        for layer in layers:
            choice = picked.get(layer.weight.name)
            form = None if choice is None else FORMS[choice.form]
            if choice is not None and isinstance(form, Structured):
                found.append((layer, form.network, form.sizes(choice.numbers)))
        ordered, moved = in_blocks(graph, found, by=self.name)
        if moved:
            context.note(f"channels reordered for blocks: {', '.join(dim.name for dim in moved)}")
        return ordered

    def _allowed(self, graph: Graph, choices: Mapping[str, Sequence[Choice]]) -> dict[str, float]:
        """The most that the layers together may cost."""
        now, allowed = figures(graph), dict[str, float]()
        for name, figure in _FIGURES.items():
            if getattr(self, name) is not None:
                whole = getattr(now, figure)
                own = sum(getattr(found[0], figure) for found in choices.values())
                allowed[figure] = parse_amount(getattr(self, name), name).of(whole) - (whole - own)
        return allowed


def _links(layer: Layer, choice: Choice) -> list[Link]:
    return FORMS[choice.form].links(Problem(layer, matrix_of(layer)), choice.numbers)[0]


def _most(layer: Layer) -> int:
    return min(layer.outputs, layer.columns)


def _nearest(choices: Sequence[Choice], rank: float) -> Choice:
    """Of the choices whose ranks come closest that which loses least; a share is one of the greatest."""
    possible = choices[1:]
    if not possible:
        return choices[0]
    wanted = rank * max(choice.ranks[0] for choice in possible) if rank < 1 else rank
    return min(possible, key=lambda choice: (max(abs(own - wanted) for own in choice.ranks), choice.loss))
