"""The gradient of a region, as a graph of the same operators, of which the same generator makes a kernel.

    region    silu_mul(%gate, %up):             %silu = silu(%gate); return mul(%silu, %up)
    gradient  silu_mul_gradient(%gate, %up, %g): the gradients of %gate and %up, of the gradient %g of the result

Each node is taken apart into the primitives of its element (:mod:`regauge.ir.scalars`), laid along the axes of the
node; derivatives are those of :mod:`regauge.ir.derivatives`. What was computed forward is computed again, from what the
region reads, so that nothing else has to be kept; numbers inside have single precision, at least.

Kernels are of gradients of what each row has for itself, and of the entries that rows look up in a table: torch adds
these up, sorted by their numbers. Those of weights, which rows share, are sums over rows: a kernel of what each row has
adds them up, too, where a program has whole rows, as of gains of norms and of biases; others are left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from regauge.ir.edit import Builder, remove_dead
from regauge.ir.errors import FusionError
from regauge.ir.fusion.attention_gradients import AttentionGradient, attention_gradient, bias_gradient, biases_of
from regauge.ir.fusion.fuse import traced
from regauge.ir.fusion.gradient_frames import Frame, is_float
from regauge.ir.fusion.legality import fault
from regauge.ir.fusion.region import below_results
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.graph_copy import copy_graph
from regauge.ir.sizes.expressions import is_static, product

SHARED = "rows share it: its gradient is a sum over rows"


@dataclass(frozen=True)
class Entries:
    """What is looked up in an input ``table`` at the ``numbers`` that another input holds; both by number."""

    table: int
    numbers: int


@dataclass(frozen=True)
class Gradient:
    """Gradients that one kernel computes: a graph that reads the inputs ``reads`` of a region and, behind them, the
    gradients of its results ``given``, and returns for each entry of ``of`` the gradient that these inputs have; all
    by number. It may also be that of entries of tables, which are in ``entries``, one for each entry of ``of``. Of
    ``attention`` kernels are other ones."""

    graph: Graph
    reads: tuple[int, ...]
    given: tuple[int, ...]
    of: tuple[tuple[int, ...], ...]
    entries: tuple[tuple[Entries, ...], ...]
    attention: AttentionGradient | None = None


@dataclass(frozen=True)
class Gradients:
    """The gradients of the inputs of a region: what kernels compute, and of the inputs ``passed`` the result whose
    gradient theirs is. ``left`` says by name of all other inputs that are floats why they are not among these."""

    kernels: tuple[Gradient, ...] = ()
    passed: Mapping[int | Entries, int] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)


def gradients_of(body: Graph) -> Gradients:
    """The gradients, of row form, of the inputs of a region; raises FusionError where none can be stated."""
    region = traced(body)
    if region.contractions:
        return _of_attention(body, attention_gradient(body, region))
    rows = frozenset(region.loops) - region.reduced
    shared = {load.value.value for load in region.loads if not rows <= load.axes}
    tables = {load.value.value for load in region.loads if load.value.picked}
    reverse = _Reverse(body, shared, tables)
    adjoints = reverse.run()
    place = {value: number for number, value in enumerate(body.inputs)}
    found: dict[Value, list[int | Entries]] = {}
    rounded: dict[Any, Value] = {}
    left: dict[str, str] = {}
    for table, parts in reverse.entries.items():
        if all(numbers in place for _, numbers in parts) and table not in adjoints:
            for part, numbers in parts:
                one = Entries(place[table], place[numbers])
                found.setdefault(reverse.typed(part, table.dtype), []).append(one)
        else:
            left[table.name] = "it is looked up in by numbers that are computed, or read otherwise, too"
    for number, value in enumerate(body.inputs):
        if value in tables:
            continue
        if value in adjoints:
            key = adjoints[value], value.dtype
            if key not in rounded:
                rounded[key] = reverse.typed(*key)
            found.setdefault(rounded[key], []).append(number)
        elif is_float(value):
            left[value.name] = "nothing that has a gradient depends on it"
    given = {gradient: result for result, gradient in enumerate(reverse.given)}
    passed = {one: given[value] for value, of in found.items() if value in given for one in of}
    found = {value: of for value, of in found.items() if value not in given}
    sums = {rounded[adjoints[value], value.dtype] for value in shared if value in adjoints}
    return _in_kernels(body, reverse, found, sums, passed, left)


def _of_attention(body: Graph, found: AttentionGradient) -> Gradients:
    """Those of queries, keys and values by one operator, and that of each bias, which is seldom wanted, by another."""
    place = {value: number for number, value in enumerate(body.inputs)}
    reads = tuple(range(len(body.inputs)))
    all_, left = [found], dict[str, str]()
    for bias in biases_of(found.region):
        try:
            all_.append(bias_gradient(body, found, bias))
        except FusionError as error:
            left[bias.value.value.name] = str(error)

    def kernel(one: AttentionGradient) -> Gradient:
        of = tuple((place[load.value.value],) for load in one.of)
        return Gradient(one.graph, reads, (0,), of, ((),) * len(of), one)

    return Gradients(tuple(map(kernel, all_)), left=left)


def all_gradients(body: Graph) -> tuple[Graph, tuple[int, ...]]:
    """The gradients of all inputs that have one, those that rows share, too: a graph that reads the inputs and, behind
    them, the gradients of the results, and the numbers of the inputs whose gradients it returns.

    Raises FusionError where none can be stated.
    """
    reverse = _Reverse(body)
    adjoints = reverse.run()
    of = tuple(number for number, value in enumerate(body.inputs) if value in adjoints)
    reverse.graph.outputs = [reverse.typed(adjoints[body.inputs[number]], body.inputs[number].dtype) for number in of]
    return reverse.graph, of


def _in_kernels(
    body: Graph,
    reverse: _Reverse,
    found: Mapping[Value, Sequence[int | Entries]],
    sums: Collection[Value],
    passed: Mapping[int | Entries, int],
    left: dict[str, str],
) -> Gradients:
    """Results in as few kernels as are legal, each with the first that it can be with; ``sums`` go over rows."""
    kernels: list[tuple[list[Value], Gradient]] = []
    for value, of in found.items():
        why = ""
        for place, others in enumerate([*(values for values, _ in kernels), []]):
            values = [*others, value]
            made = _gradient(reverse, {one: found[one] for one in values}, len(body.inputs))
            try:
                region = traced(made.graph)
                why = fault(region) or ""
                totals = sum(below_results(region.results[one]) in region.totals for one in region.outputs)
                why = why or (SHARED if totals != sum(one in sums for one in values) else "")
            except FusionError as error:
                why = str(error)
            if not why:
                kernels[place : place + 1] = [(values, made)]
                break
        if why:
            numbers = [one.table if isinstance(one, Entries) else one for one in of]
            left.update((body.inputs[number].name, why) for number in numbers)
    return Gradients(tuple(made for _, made in kernels), passed, left)


def _gradient(reverse: _Reverse, results: Mapping[Value, Sequence[int | Entries]], count: int) -> Gradient:
    """A kernel of some results, that reads nothing else than what these need; the region has ``count`` inputs."""
    whole = reverse.graph
    whole.outputs = list(results)
    graph = copy_graph(whole)
    remove_dead(graph)
    used = [number for number, value in enumerate(graph.inputs) if value.uses]
    graph.inputs = [graph.inputs[number] for number in used]
    reads = tuple(number for number in used if number < count)
    given = tuple(number - count for number in used if number >= count)
    of = tuple(tuple(one for one in all_ if isinstance(one, int)) for all_ in results.values())
    entries = tuple(tuple(one for one in all_ if isinstance(one, Entries)) for all_ in results.values())
    return Gradient(graph, reads, given, of, entries)


class _Reverse:
    """Builds a graph: first what the region computes, then the gradients, from its results back to its inputs.

    Inputs that rows share are made wider wherever they are read: what nothing else connects stays apart, and can be
    computed beside one another. Of ``tables`` the gradients of what is looked up are kept as ``entries``, each with its
    numbers; of others they are added up.
    """

    def __init__(self, body: Graph, shared: Collection[Value] = (), tables: Collection[Value] = ()) -> None:
        self.body, self.tables = body, tables
        self.entries: dict[Value, list[tuple[Value, Any]]] = {}
        self.graph = Graph(f"{body.name}_gradient")
        self.build = Builder(self.graph)
        types = {value.dtype for value in [*body.inputs, *(v for node in body.nodes for v in node.outputs)]}
        self.wide = torch.float64 if torch.float64 in types else torch.float32
        self.values: dict[Value, Value] = {}
        given = [self.build.input(value.name, value.shape, value.dtype) for value in body.inputs]
        self.given = [
            self.build.input(f"g_{value.name}", value.shape, value.dtype)
            for value in body.outputs
            if isinstance(value, Value)
        ]
        for value, own in zip(body.inputs, given, strict=True):
            self.values[value] = self.typed(own, self.wide) if is_float(value) and value not in shared else own

    def run(self) -> dict[Value, Value]:
        """The gradient of each value that has one."""
        frames = {}
        for node in self.body.nodes:
            if node.op in MOVES:
                self.values[node.output] = self.build(node.op, *map(self.read, node.inputs), **node.attributes)
            else:
                frames[node] = Frame(self, node)
                self.values[node.output] = frames[node].forward()
        adjoints: dict[Value, Value] = {}
        outputs = [value for value in self.body.outputs if isinstance(value, Value)]
        for value, given in zip(outputs, self.given, strict=True):
            self._add(adjoints, value, self.typed(given, self.wide))
        for node in reversed(list(self.body.nodes)):
            if node.output not in adjoints:
                continue
            g = adjoints[node.output]
            parts = MOVES[node.op](self.build, node, g) if node.op in MOVES else frames[node].backward(g)
            tables = frames[node].tables if node in frames else {}
            for slot, part in parts.items():
                operand = node.inputs[slot]
                assert isinstance(operand, Value)
                if slot in tables and operand in self.tables:
                    self.entries.setdefault(operand, []).append((part, node.inputs[tables[slot]]))
                else:
                    part = self._summed(operand, part, node.inputs[tables[slot]]) if slot in tables else part
                    self._add(adjoints, operand, part)
        return adjoints

    def _summed(self, table: Any, part: Value, numbers: Any) -> Value:
        """The gradient of a table: that of what was looked up, added up where it stands."""
        rows = self.build.reshape(part, shape=(product(numbers.shape), *table.shape[1:]))
        index = self.build.reshape(self.values[numbers], shape=(product(numbers.shape),))
        if table.rank == 1:  # of weights of classes: a label that is ignored is the number of none, and has no gradient
            index = self.build.clamp(index, 0, table.shape[0] - 1)
        zeros = self.build.full(shape=table.shape, value=0.0, dtype=self.wide)
        return self.build.index_add(zeros, index, rows, dim=0)  # type: ignore[no-any-return]

    def read(self, given: Any) -> Any:
        """An operand of a node of the region."""
        if not isinstance(given, Value):
            return given
        return self.typed(self.values[given], self.wide) if is_float(given) else self.values[given]

    def _add(self, adjoints: dict[Value, Value], value: Any, part: Value) -> None:
        if isinstance(value, Value) and is_float(value):
            adjoints[value] = self.build.add(adjoints[value], part) if value in adjoints else part

    def typed(self, value: Value, dtype: Any) -> Value:
        """A value in another type; what was only made wider is given back as it was."""
        if value.dtype == dtype:
            return value
        node = value.producer
        if node is not None and node.op == "cast" and value.dtype == self.wide and node.inputs[0].dtype == dtype:  # type: ignore[union-attr]
            return node.inputs[0]  # type: ignore[return-value]
        found: Value = self.build.cast(value, dtype=dtype)
        return found


# -- changes of place --------------------------------------------------------------------------------------------------


def _sliced(build: Builder, node: Node, g: Value) -> dict[int, Value]:
    """What is cut out has the gradient, what is left none."""
    x, dim, start = node.inputs[0], node.attributes["dim"], node.attributes["start"]
    assert isinstance(x, Value)
    if node.attributes["step"] != 1:
        raise FusionError("the derivative of a slice with steps is not stated")
    pads = [(0, 0)] * x.rank
    pads[dim] = (start, x.shape[dim] - start - g.shape[dim])
    return {0: build.pad(g, pads=tuple(pads))}


def _joined(build: Builder, node: Node, g: Value) -> dict[int, Value]:
    """Each operand has its segment."""
    dim = node.attributes["dim"]
    parts: dict[int, Value] = {}
    start: Any = 0
    for slot, value in node.operands():
        end = start + value.shape[dim]
        parts[slot] = build.slice(g, dim=dim, start=start, end=end, step=1)
        start = end
    return parts


def _padded(build: Builder, node: Node, g: Value) -> dict[int, Value]:
    """What was there before has the gradient."""
    x = node.inputs[0]
    assert isinstance(x, Value)
    if node.attributes["mode"] != "constant":
        raise FusionError(f"the derivative of a pad of mode {node.attributes['mode']} is not stated")
    for dim, (before, after) in enumerate(node.attributes["pads"]):
        if any(not is_static(size) or size < 0 for size in (before, after)):
            raise FusionError("the derivative of a pad that cuts off is not stated")
        if not (before == 0 and after == 0):
            g = build.slice(g, dim=dim, start=before, end=before + x.shape[dim], step=1)
    return {0: g}


def _turned(build: Builder, node: Node, g: Value) -> dict[int, Value]:
    """Turned back."""
    return {0: build.flip(g, dims=node.attributes["dims"])}


MOVES: Mapping[str, Callable[[Builder, Node, Value], dict[int, Value]]] = {
    "slice": _sliced, "concat": _joined, "pad": _padded, "flip": _turned,
}  # fmt: skip
"""Operators that read at other places: the gradients of their operands, by slot."""
