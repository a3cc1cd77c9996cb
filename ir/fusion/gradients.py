"""The gradient of a region, as a graph of the same operators, of which the same generator makes a kernel.

    region    silu_mul(%gate, %up):             %silu = silu(%gate); return mul(%silu, %up)
    gradient  silu_mul_gradient(%gate, %up, %g): the gradients of %gate and %up, of the gradient %g of the result

Each node is taken apart into the primitives of its element (:mod:`regauge.ir.scalars`), laid along the axes of the
node; derivatives are those of :mod:`regauge.ir.derivatives`. What was computed forward is computed again, from what the
region reads, so that nothing else has to be kept; numbers inside have single precision, at least.

Kernels are of gradients of what each row has for itself. Those of weights and tables, which rows share, are sums over
rows: programs of the generator would read these across memory, entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from regauge.ir.atoms import Atoms
from regauge.ir.axes import apply_rule
from regauge.ir.derivatives import gradients
from regauge.ir.dtypes import epsilon_of
from regauge.ir.edit import Builder, remove_dead
from regauge.ir.errors import AxisError, FusionError
from regauge.ir.extents import Dim, fresh
from regauge.ir.fusion.fused import traced
from regauge.ir.fusion.legality import fault
from regauge.ir.fusion.region import no_element
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.graph_copy import copy_graph
from regauge.ir.rules import ENDING_ROLES, Axes, Call
from regauge.ir.scalars import PRIMITIVES, REDUCTIONS, Scalar, element_of, operand
from regauge.ir.sizes import is_static, product, same

SHARED = "rows share it: its gradient is a sum over rows"


@dataclass(frozen=True)
class Gradient:
    """Gradients that one kernel computes: a graph that reads the inputs ``reads`` of a region and, behind them, the
    gradients of its results ``given``, and returns for each entry of ``of`` the gradient that these inputs have; all
    by number."""

    graph: Graph
    reads: tuple[int, ...]
    given: tuple[int, ...]
    of: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Gradients:
    """The gradients of the inputs of a region: what kernels compute, and of the inputs ``passed`` the result whose
    gradient theirs is. ``left`` says by name of all other inputs that are floats why they are not among these."""

    kernels: tuple[Gradient, ...] = ()
    passed: Mapping[int, int] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)


def gradients_of(body: Graph) -> Gradients:
    """The gradients, of row form, of the inputs of a region; raises FusionError where none can be stated."""
    region = traced(body)
    if region.contractions:
        raise FusionError(f"{body.name}: the gradients of products are products of their own")
    rows = frozenset(region.loops) - region.reduced
    shared = {load.value.value for load in region.loads if not rows <= load.axes}
    reverse = _Reverse(body, shared)
    adjoints = reverse.run()
    found: dict[Value, list[int]] = {}
    rounded: dict[Any, Value] = {}
    left: dict[str, str] = {}
    for number, value in enumerate(body.inputs):
        if value in adjoints and value not in shared:
            key = adjoints[value], value.dtype
            if key not in rounded:
                rounded[key] = reverse.typed(*key)
            found.setdefault(rounded[key], []).append(number)
        elif is_float(value):
            left[value.name] = SHARED if value in adjoints else "nothing that has a gradient depends on it"
    given = {gradient: result for result, gradient in enumerate(reverse.given)}
    passed = {number: given[value] for value, numbers in found.items() if value in given for number in numbers}
    found = {value: numbers for value, numbers in found.items() if value not in given}
    return _in_kernels(body, reverse, found, passed, left)


def all_gradients(body: Graph) -> tuple[Graph, tuple[int, ...]]:
    """The gradients of all inputs that have one, those that rows share, too: a graph that reads the inputs and, behind
    them, the gradients of the results, and the numbers of the inputs whose gradients it returns.

    Raises FusionError where none can be stated.
    """
    reverse = _Reverse(body, ())
    adjoints = reverse.run()
    of = tuple(number for number, value in enumerate(body.inputs) if value in adjoints)
    reverse.graph.outputs = [reverse.typed(adjoints[body.inputs[number]], body.inputs[number].dtype) for number in of]
    return reverse.graph, of


def _in_kernels(
    body: Graph, reverse: _Reverse, found: dict[Value, list[int]], passed: dict[int, int], left: dict[str, str]
) -> Gradients:
    """Results in as few kernels as are legal, each with the first that it can be with."""
    kernels: list[tuple[list[Value], Gradient]] = []
    for value, numbers in found.items():
        why = ""
        for place, others in enumerate([*(values for values, _ in kernels), []]):
            values = [*others, value]
            made = _gradient(reverse, {one: found[one] for one in values}, len(body.inputs))
            try:
                why = fault(traced(made.graph)) or ""
            except FusionError as error:
                why = str(error)
            if not why:
                kernels[place : place + 1] = [(values, made)]
                break
        if why:
            left.update((body.inputs[number].name, why) for number in numbers)
    return Gradients(tuple(made for _, made in kernels), passed, left)


def _gradient(reverse: _Reverse, results: Mapping[Value, Sequence[int]], count: int) -> Gradient:
    """A kernel of some results, that reads nothing else than what these need; the region has ``count`` inputs."""
    whole = reverse.graph
    whole.outputs = list(results)
    graph = copy_graph(whole)
    remove_dead(graph)
    used = [number for number, value in enumerate(graph.inputs) if value.uses]
    graph.inputs = [graph.inputs[number] for number in used]
    reads = tuple(number for number in used if number < count)
    given = tuple(number - count for number in used if number >= count)
    return Gradient(graph, reads, given, tuple(map(tuple, results.values())))


class _Reverse:
    """Builds a graph: first what the region computes, then the gradients, from its results back to its inputs.

    Inputs that rows share are made wider wherever they are read: what nothing else connects stays apart, and can be
    computed beside one another.
    """

    def __init__(self, body: Graph, shared: Collection[Value]) -> None:
        self.body = body
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
                frames[node] = _Frame(self, node)
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
            for slot, part in parts.items():
                self._add(adjoints, node.inputs[slot], part)
        return adjoints

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


def is_float(value: Value) -> bool:
    return isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point and value.dtype.itemsize > 1


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


# -- expressions -------------------------------------------------------------------------------------------------------


class _Frame:
    """The axes of one node, and its element laid along them: a value has an axis for each, of size 1 where it has none.

    What is computed forward and what is computed backward of an expression share their parts.
    """

    def __init__(self, reverse: _Reverse, node: Node) -> None:
        self.reverse, self.build, self.node = reverse, reverse.build, node
        element = element_of(node)
        if element is None:
            raise FusionError(no_element(node.operator))
        self.element = element
        self.seed = operand(len(node.inputs))
        given: list[Axes | None] = [
            [fresh(size) for size in value.shape] if isinstance(value, Value) else None if value is None else []
            for value in node.inputs
        ]
        call = Call(node, given)
        try:
            (result,) = apply_rule(node.operator, call)
        except (AxisError, ValueError) as error:
            raise FusionError(f"the axis rule of {node.op} does not fit") from error
        atoms = Atoms()
        self.layouts = [[atoms.of(extent) for extent in axes or ()] for axes in (*given, result)]
        longest = sorted(self.layouts, key=lambda layout: -sum(map(len, layout)))
        self.dims: list[Dim] = list(dict.fromkeys(dim for layout in longest for axis in layout for dim in axis))
        ends = [dim for role, extent in call.roles if role in ENDING_ROLES for dim in atoms.of(extent)]
        self.ended = frozenset(self.dims.index(dim) for dim in dict.fromkeys(ends))
        self.operands: list[Any] = [reverse.read(value) for value in node.inputs]
        self.known: dict[Scalar, Any] = {}
        self.known_axes: dict[Scalar, frozenset[int]] = {}

    def forward(self) -> Value:
        self.value(self.element)
        if not self._axes(self.element) <= {self.dims.index(dim) for axis in self.layouts[-1] for dim in axis}:
            raise FusionError(f"{self.node.op} moves indices across axes")
        return self._unlaid(self.element, self.layouts[-1])

    def backward(self, gradient: Value) -> dict[int, Value]:
        """The gradients of the operands, by slot."""
        self.operands.append(gradient)
        wanted = [slot for slot, value in self.node.operands() if is_float(value)]
        found = gradients(self.element, self.seed, wanted, self._axes, self.ended)
        return {slot: self._unlaid(part, self.layouts[slot]) for slot, part in found.items()}

    # -- axes --------------------------------------------------------------------------------------------------------

    def _axes(self, scalar: Scalar) -> frozenset[int]:
        """The numbers of the axes along which an expression goes."""
        if scalar not in self.known_axes:
            if scalar.op == "operand":
                found = frozenset(self.dims.index(dim) for axis in self.layouts[scalar.value] for dim in axis)
            else:
                found = frozenset(axis for arg in scalar.args for axis in self._axes(arg))
            self.known_axes[scalar] = found - self.ended if scalar.op in REDUCTIONS else found
        return self.known_axes[scalar]

    def _laid(self, slot: int) -> Value:
        """An operand along the axes of the frame."""
        layout, value = self.layouts[slot], self.operands[slot]
        own = [dim for axis in layout for dim in axis]
        order = sorted(range(len(own)), key=lambda place: self.dims.index(own[place]))
        value = self._reshaped(value, [dim.size for dim in own])
        if order != list(range(len(own))):
            value = self.build.permute(value, dims=tuple(order))
        return self._reshaped(value, [dim.size if dim in own else 1 for dim in self.dims])

    def _unlaid(self, scalar: Scalar, layout: Sequence[tuple[Dim, ...]]) -> Value:
        """An expression as a value with the axes of ``layout``: summed over those that this has not."""
        value, axes = self.value(scalar), self._axes(scalar)
        own = [dim for axis in layout for dim in axis]
        more = [axis for axis in sorted(axes) if self.dims[axis] not in own]
        if more:
            value = self.build.sum(value, dims=tuple(more), keepdim=True)
        target = [dim.size if dim in own else 1 for dim in self.dims]
        if any(dim in own and axis not in axes for axis, dim in enumerate(self.dims)):
            value = self.build.expand(value, shape=tuple(target))
        kept = [dim for dim in self.dims if dim in own]
        value = self._reshaped(value, [dim.size for dim in kept])
        order = [kept.index(dim) for dim in own]
        if order != list(range(len(own))):
            value = self.build.permute(value, dims=tuple(order))
        return self._reshaped(value, [product(dim.size for dim in axis) for axis in layout])

    def _reshaped(self, value: Value, shape: Sequence[Any]) -> Value:
        if len(shape) == value.rank and all(map(same, shape, value.shape)):
            return value
        found: Value = self.build.reshape(value, shape=tuple(shape))
        return found

    # -- values ------------------------------------------------------------------------------------------------------

    def value(self, scalar: Scalar) -> Any:
        """An expression as a value along the axes of the frame, or as a number."""
        if scalar not in self.known:
            self.known[scalar] = self._made(scalar)
        return self.known[scalar]

    def _made(self, scalar: Scalar) -> Any:
        match scalar.op:
            case "operand":
                return self._laid(scalar.value)
            case "number":
                return scalar.value
            case "count":
                size = product(self.dims[axis].size for axis in self.ended)
                if not is_static(size):
                    raise FusionError(f"{self.node.op} divides by the dynamic size {size}")
                return size
            case "epsilon":
                return epsilon_of(self.node.output.dtype)
        args = [self.value(arg) for arg in scalar.args]
        if scalar.op in REDUCTIONS:
            return self._reduced(scalar, args[0])
        if scalar.op not in PRIMITIVES:
            raise FusionError(f"the derivative of {self.node.op} is not stated")
        if not any(isinstance(arg, Value) for arg in args):
            return float(PRIMITIVES[scalar.op](*(torch.tensor(arg, dtype=torch.float64) for arg in args)))
        return self._primitive(scalar.op, args)

    def _reduced(self, scalar: Scalar, x: Any) -> Any:
        if not self.ended:
            return x
        if not self.ended <= self._axes(scalar.args[0]):
            raise FusionError(f"{self.node.op} would reduce an axis that is only broadcast")
        return self.build(scalar.op, x, dims=tuple(sorted(self.ended)), keepdim=True)

    def _primitive(self, op: str, args: list[Any]) -> Any:
        build = self.build
        if op == "real":
            return self.reverse.typed(args[0], self.reverse.wide)
        if op in ("maximum", "minimum") and not all(isinstance(arg, Value) for arg in args):
            x, bound = args if isinstance(args[0], Value) else reversed(args)
            return build.clamp(x, bound, None) if op == "maximum" else build.clamp(x, None, bound)
        if op == "where" and isinstance(args[0], Value) and args[0].dtype != torch.bool:
            args[0] = build.ne(args[0], 0)
        return build(op, *args)
