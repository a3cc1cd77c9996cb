"""``factorize``: layers as products of smaller ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from regauge.ir.cost import figures, local_figures
from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.allocation.amounts import parse_amount
from regauge.passes.base import GIVE_DATA, Context, Contract, Cut, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.calibration.layers import Layer
from regauge.passes.factorization.blocks import choices_of
from regauge.passes.factorization.catalog import FORMS, UNASKED
from regauge.passes.factorization.chains import Link, write_chain
from regauge.passes.factorization.cost_gate import CostGate, Gate
from regauge.passes.factorization.forms import Choice, Form
from regauge.passes.factorization.metric_svd import Factored
from regauge.passes.factorization.metrics import Metric, squared_gradients
from regauge.passes.factorization.on_data import Sensitivity, links_on_data, problems_on_data
from regauge.passes.factorization.orders import in_blocks
from regauge.passes.factorization.problems import Problem, plain_problems
from regauge.passes.factorization.ranks import least_loss, spread
from regauge.passes.factorization.readers import Reader, readers_in, squared_reader_gradients
from regauge.passes.factorization.rules import Rule, by_rule, keeping, nearest, squared_values, wanted_by
from regauge.passes.factorization.sparse_products import SparseProduct
from regauge.passes.factorization.stacks import as_read
from regauge.passes.factorization.structured import Structured
from regauge.passes.factorization.without_data import links_without_data
from regauge.passes.name_patterns import matches
from regauge.passes.options import option

_FIGURES = {"params": "parameters", "macs": "macs"}


@dataclass(frozen=True, kw_only=True)
class Factorize(Pass):
    """Replace layers by products of smaller ones, where these have fewer parameters or multiplications.

    before  y = linear(x, w, b)                    w: f32[384,96]
    after   y = linear(linear(x, down), up, b)     down: f32[24,96], up: f32[384,24]

    Forms and ranks are chosen so that least is lost in all. With data what is kept are the directions that the outputs
    of a layer take on it, weighed by how much the outputs of the model move with them, one layer after the other, each
    with the inputs that the layers before give. Experts, whose weights are a stack of matrices, have one rank: each is
    fitted to the rows that it gets, in one metric of outputs for all, and to what it made of them. Without data biases
    make up for the mean of what is lost, where batch norms tell it.
    """

    name: ClassVar[str] = "factorize"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True
    wants_layers: ClassVar[bool] = True

    params: float | str | None = option(None, "parameters kept: a share (0.5) or a number (1.2M)")
    macs: float | str | None = option(None, "multiply-accumulates kept: a share or a number (300M)")
    rank: float | None = option(
        None, "the rank of every layer instead: a number, or a share of the greatest that saves anything", above=0
    )
    energy: float | None = option(
        None,
        "as few ranks instead as keep this share of what each layer gives, 0.99 of its squares",
        above=0,
        at_most=1,
    )
    form: (
        Literal[
            "low-rank",
            "tucker",
            "tucker-1",
            "columns",
            "rows",
            "cp",
            "tt",
            "monarch",
            "block-dense",
            "block-diagonal",
            "btt",
            "kronecker",
            "mpo",
            "faust",
        ]
        | None
    ) = option(None, "what layers become; if not given, for each the best of the first five")
    permute: bool = option(True, "hidden channels are reordered where this suits the blocks of structured forms")
    search: bool = option(
        False, "of structured forms the order and sizes of axes and each bond are searched for, one after the other"
    )
    rule: Rule = option("knapsack", "how ranks are shared out: so that least is lost, or by a rule of thumb")
    metric: Metric = option("output-aware", "what factors keep on data (without data: plain)")
    gate: Gate = option(
        "off", "links that take no less time than their layer, as measured on this machine: warn, or refuse them"
    )
    multiple: int = option(1, "ranks are multiples of it, or 1 where a layer has no room for one", at_least=1)
    include: tuple[str, ...] = option((), "globs on names of weights: only these")
    exclude: tuple[str, ...] = option((), "globs on names of weights: not these")
    tables: bool = option(False, "tables of vectors and what recurrent layers read are factorized, too")
    seed: int = option(0, "seed of the directions of gradients", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        budgets = [name for name in _FIGURES if getattr(self, name) is not None]
        for name in budgets:
            parse_amount(getattr(self, name), name)
        if self.rank is None and self.energy is None and not budgets:
            raise PassError(
                "factorize: say how small it is to become: factorize{params=0.5}, {macs=0.5} or {rank=16}, or by "
                "{energy=0.99} how much each layer keeps"
            )
        for name, value, others in [
            ("rank", self.rank, budgets),
            ("energy", self.energy, ["rank"] if self.rank is not None else budgets),
        ]:
            if value is not None and others:
                raise PassError(f"factorize: give {name}={value:g} or {others[0]}=..., not both")
        if self.rank is not None and self.rank >= 1 and self.rank != int(self.rank):
            raise PassError(f"factorize: rank={self.rank:g} is neither a share nor a whole number")

    def call(self, graph: Graph, context: Context) -> Graph:
        given, graph = graph, as_read(graph, by=self.name)
        readers = self._readers(graph)
        layers = self._layers(graph, context.left, readers)
        if not layers and not readers:
            return given
        squares: Mapping[str, torch.Tensor] = {}
        if context.data is None:
            self._check_without_data()
            batches = None
            problems: Iterable[list[Problem]] = map(plain_problems, layers)
        else:
            batches = calibration_batches(graph, context)
            sensitivity = Sensitivity.of(graph, layers, batches, self.seed, self.metric)
            problems = problems_on_data(graph, layers, batches, sensitivity)
            if self.rule == "fisher":
                squares = squared_gradients(graph, layers, batches, self.seed)
        factors = self._factors(graph, readers, batches)
        choices, values, carried = self._choices(graph, problems)
        for reader in readers:
            found = factors[reader.name]
            choices[reader.name] = reader.choices(graph, found, self.multiple, on_data=batches is not None)
            values[reader.name] = (found.tail[:-1] - found.tail[1:]).clamp(min=0)
            carried[reader.name] = float(found.tail[0]) / reader.scale(found, on_data=batches is not None)
        if batches is None and self.energy is None:
            choices = spread(choices)

        def solve() -> dict[str, Choice]:
            if self.energy is not None:
                return keeping(choices, carried, self.energy)
            return self._picked(graph, choices, values, squares)

        picked = self._gated(graph, layers, choices, solve, context)
        context.left["it is worth more whole"] += len(layers) + len(readers) - len(picked)
        if not picked:
            return given
        original = self._ordered(graph, layers, picked, context) if self.permute else graph
        if original is not graph and batches is not None:
            layers = self._layers(original, Counter(), readers)
            sensitivity = Sensitivity.of(original, layers, batches, self.seed, self.metric)
        result = original.copy()
        small = self._small(result, factors, picked)
        own = [layer for layer in self._layers(result, Counter(), readers) if layer.weight.name in picked]
        if batches is None:
            solved = list(links_without_data(original, result, own, picked, by=self.name))
            links = [(layer, found) for layer, found, _ in solved]
            if count := sum(corrected for *_, corrected in solved):
                context.note(f"{count} of {len(own)} biases corrected by what batch norms hold")
        else:
            links = list(links_on_data(original, result, own, picked, batches, sensitivity, by=self.name))
            context.note(f"chosen on {sum(map(examples_in, batches))} examples")
        self._write(result, links, small, picked, context)
        return result

    def _write(
        self,
        result: Graph,
        links: Sequence[tuple[Layer, list[Link]]],
        small: Sequence[tuple[Reader, tuple[torch.Tensor, torch.Tensor]]],
        picked: Mapping[str, Choice],
        context: Context,
    ) -> None:
        """Put what was found in the places of the layers, and say so."""
        zeros = sum(int((link.weight == 0).sum()) for layer, own in links for link in own if _is_sparse(picked, layer))
        if zeros:
            context.note(f"{zeros} entries of factors are zero: to_onnx(sparse_weights=True) leaves them out")
        for layer, own in links:
            choice = picked[layer.weight.name]
            form = " ".join([choice.form, "x".join(map(str, choice.axes))]).strip()
            context.cuts.append(Cut(f"{layer.weight.name} ({form}): rank", _most(layer), choice.ranks[0]))
            write_chain(result, layer, own, by=self.name)
        for reader, (up, down) in small:
            context.cuts.append(Cut(f"{reader.name} (low-rank): rank", min(len(up), down.shape[1]), len(down)))
            reader.write(result, up, down, by=self.name)
        remove_dead(result)

    def _forms(self) -> list[Form]:
        forms = [FORMS[name] for name in ([self.form] if self.form is not None else UNASKED)]
        return [replace(form, searched=self.search) if isinstance(form, Structured) else form for form in forms]

    def _readers(self, graph: Graph) -> list[Reader]:
        if not self.tables or self.form not in (None, "low-rank"):
            return []
        return [
            reader
            for reader in readers_in(graph)
            if (not self.include or matches(reader.weights[0].names, self.include))
            and not matches(reader.weights[0].names, self.exclude)
        ]

    def _factors(self, graph: Graph, readers: Sequence[Reader], batches: Sequence[Any] | None) -> dict[str, Factored]:
        """Of tables and recurrent layers; with data in the metrics that squared gradients give."""
        squares: Mapping[str, torch.Tensor] = {}
        if readers and batches is not None and self.metric != "plain":
            squares = squared_reader_gradients(graph, readers, batches, self.seed)
        return {reader.name: reader.factors(squares.get(reader.name)) for reader in readers}

    def _small(
        self, result: Graph, factors: Mapping[str, Factored], picked: Mapping[str, Choice]
    ) -> list[tuple[Reader, tuple[torch.Tensor, torch.Tensor]]]:
        """Tables and recurrent layers with their two factors, whose product they hold: layers behind make up for it."""
        small = [
            (reader, factors[reader.name].of_rank(picked[reader.name].ranks[0]))
            for reader in readers_in(result)
            if reader.name in picked
        ]
        for reader, pair in small:
            reader.set_product(result, *pair, by=self.name)
        return small

    def _layers(self, graph: Graph, left: Counter[str], readers: Sequence[Reader]) -> list[Layer]:
        def misfit(layer: Layer) -> str | None:
            reasons = [form.misfit(layer) for form in self._forms()]
            return reasons[0] if all(reasons) else None

        names = {weight.name for reader in readers for weight in reader.weights}
        apart = [parameter for parameter in graph.all_parameters() if parameter.name in names]
        return chosen_layers(graph, self.include, self.exclude, left, misfit, blocks=True, apart=apart)

    def _check_without_data(self) -> None:
        if self.rule == "fisher":
            raise PassError(f"factorize: rule=fisher takes gradients on data: give another rule, or {GIVE_DATA}")
        if self.metric not in ("output-aware", "plain"):
            raise PassError(f"factorize: metric={self.metric} is of what layers get on data: {GIVE_DATA}")

    def _choices(
        self, graph: Graph, problems: Iterable[list[Problem]]
    ) -> tuple[dict[str, list[Choice]], dict[str, torch.Tensor], dict[str, float]]:
        """What each layer may become, whole first, by the name of its weight; squared singular values for rules; and
        what a layer would lose without any weight."""
        choices, values, carried = dict[str, list[Choice]](), dict[str, torch.Tensor](), dict[str, float]()
        for blocks in problems:
            layer = blocks[0].layer
            macs = local_figures([layer.node], graph).macs
            choices[layer.weight.name] = [Choice("", (), layer.weight.tensor.numel(), macs, 0.0)]
            if self.rule != "knapsack":
                values[layer.weight.name] = squared_values(blocks)
            if self.energy is not None:
                carried[layer.weight.name] = sum(problem.carried for problem in blocks)
            for form in self._forms():
                if form.misfit(layer) is None:
                    choices[layer.weight.name] += choices_of(form, blocks, graph, self.multiple)
        return choices, values, carried

    def _gated(
        self,
        graph: Graph,
        layers: Sequence[Layer],
        choices: dict[str, list[Choice]],
        solve: Callable[[], dict[str, Choice]],
        context: Context,
    ) -> dict[str, Choice]:
        """What is picked; what then takes no less time is noted, or taken out of ``choices``, larger ranks too."""
        picked = solve()
        if self.gate == "off":
            return picked
        if context.measure is None:
            context.note("times were not measured: nothing can run the graph")
            return picked
        gate, by_name = CostGate(graph, context.measure), {layer.weight.name: layer for layer in layers}
        told = dict[str, str]()  # of each layer the last that was measured too slow
        while slow := gate.slow(by_name, picked):
            for name, why in slow.items():
                bad = picked[name]
                ranks = ", ".join(map(str, bad.ranks))
                told[name] = f"{name}: {bad.form} of rank {ranks} takes no less time than the layer, {why}"
                choices[name] = [own for own in choices[name] if own.form != bad.form or own.macs < bad.macs]
            if self.gate == "warn":
                break
            picked = solve()
        for text in told.values():
            context.note(text)
        return picked

    def _picked(
        self,
        graph: Graph,
        choices: Mapping[str, Sequence[Choice]],
        values: Mapping[str, torch.Tensor],
        squares: Mapping[str, torch.Tensor],
    ) -> dict[str, Choice]:
        """What each layer becomes by a rank or a budget, those that do not stay whole by the name of their weight."""
        if self.rank is not None:
            picked = {name: self._of_rank(own) for name, own in choices.items()}
        elif self.rule != "knapsack":
            picked = by_rule(choices, self._allowed(graph, choices), wanted_by(self.rule, values, squares))
        else:
            picked = least_loss(choices, self._allowed(graph, choices))
        return {name: choice for name, choice in picked.items() if choice.ranks}

    def _of_rank(self, choices: Sequence[Choice]) -> Choice:
        """The choice of the rank that is asked for; a share is one of the greatest."""
        most = max((choice.ranks[0] for choice in choices[1:]), default=0)
        assert self.rank is not None
        return nearest(choices, min(most, self.rank * most if self.rank < 1 else self.rank))

    def _ordered(self, graph: Graph, layers: Sequence[Layer], picked: Mapping[str, Choice], context: Context) -> Graph:
        """The graph with its hidden channels in the order that suits what is picked."""
        found = []
        for layer in layers:
            choice = picked.get(layer.weight.name)
            form = None if choice is None else FORMS[choice.form]
            if choice is not None and isinstance(form, Structured):
                found.append((layer, form.network_of(choice.numbers), form.sizes(choice.numbers)))
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


def _is_sparse(picked: Mapping[str, Choice], layer: Layer) -> bool:
    return isinstance(FORMS[picked[layer.weight.name].form], SparseProduct)


def _most(layer: Layer) -> int:
    return min(layer.outputs, layer.columns)
