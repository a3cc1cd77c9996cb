"""Scale variables: how the values of a graph may be scaled with the same function computed.

A value is data times a scale, and each of its parts (:mod:`regauge.ir.scales.cells`) has one. What a node says of them
is read off its record (:mod:`regauge.ir.scales.scaling`), and all that the nodes say is solved at once
(:mod:`regauge.ir.scales.logarithms`). Parts whose scales are powers of one another share a *variable*:

    moves    it can be given any scale, and what takes that up is told: the weights beside it, other variables
    fixed    it is an input, an output or a state, or what comes out of an operator has a range of its own
    broken   an operator needs it as it is, or makes it of what has no scale
    held     nothing fixes it by itself, but no weight and no other variable can take a scale up

    relu(linear(x, w1, b1)) moves: w1 and b1 take the scale, w2 of linear(relu, w2) its inverse; gelu there breaks it.

A vector of scales, one per index, may be moved along the Dims whose gauge (:mod:`regauge.ir.gauge.classes`) has scales.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Literal, TypeAlias

from regauge.ir.dims.axes import Analysis
from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.dtypes import is_real
from regauge.ir.gauge.classes import Gauge, gauges
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.scales.cells import Cell, Layout, Meeting, Part, layout_of
from regauge.ir.scales.logarithms import LogScales
from regauge.ir.scales.scaling import NodeScaling, node_scaling

State: TypeAlias = Literal["moves", "fixed", "broken", "held"]

_MIXING = frozenset({"normalise", "scan", "whole", "window", "indexed"})  # roles that mix the indices of an axis


@dataclass(eq=False)
class ScaleVariable:
    """Parts that share a scale, each with its power of it, and why it stands where it does (``reasons``).

    ``follows`` are the other variables that move with this one, with their powers: empty unless it ``moves``.
    """

    parts: list[tuple[Cell, Fraction]]
    state: State
    reasons: list[str] = field(default_factory=list)
    follows: list[tuple[ScaleVariable, Fraction]] = field(default_factory=list)

    @cached_property
    def of_weights(self) -> bool:
        """Whether parameters alone have it."""
        return all(isinstance(cell.value, Parameter) for cell, _ in self.parts)

    @property
    def values(self) -> list[Value]:
        """The values that have parts in it, each once."""
        return list(dict.fromkeys(cell.value for cell, _ in self.parts))

    @property
    def first(self) -> tuple[Cell, Fraction]:
        """The first part of its activations, or of its parameters where it has no others, and its power."""
        return next((part for part in self.parts if not isinstance(part[0].value, Parameter)), self.parts[0])

    @property
    def name(self) -> str:
        return cell_name(self.first[0])


def cell_name(cell: Cell) -> str:
    """``concat``, or ``concat[1]`` for the part of its second segment."""
    return cell.value.name + (f"[{','.join(map(str, cell.segments))}]" if cell.segments else "")


@dataclass
class Scales:
    """The scale variables of a graph, in the order in which their values come."""

    graph: Graph
    variables: list[ScaleVariable]
    _of: dict[Cell, ScaleVariable]
    layouts: Mapping[Value, Layout]

    def of(self, value: Value) -> list[ScaleVariable]:
        """The variables of the parts of a value; none for one of integers."""
        layout = self.layouts.get(value)
        return [] if layout is None else [self._of[cell] for cell in layout.cells]

    def along(self, variable: ScaleVariable) -> list[Dim]:
        """The Dims of its activations along which each index may have a scale of its own."""
        self.graph.axes.name_values()
        values = [value for value in variable.values if not isinstance(value, Parameter)] or variable.values
        found = dict.fromkeys(dim for value in values for dim in sorted(self.layouts[value].all_dims, key=_by_name))
        return [dim for dim in found if Gauge.SCALE in self._gauges.get(dim, Gauge.FIXED)]

    @cached_property
    def _gauges(self) -> Mapping[Dim, Gauge]:
        return gauges(self.graph)


def _by_name(dim: Dim) -> str:
    return dim.name


def find_scales(graph: Graph) -> Scales:
    """The scale variables of a graph; one walk over its nodes, in regions too."""
    collector = Collector(graph.axes)
    for part in graph.nested():
        where = "the graph" if part is graph else "a region"
        for value in part.inputs:
            collector.pin(value, "fixed", f"it is an input of {where}")
        for output in part.outputs:
            if isinstance(output, Value):
                collector.pin(output, "fixed", f"it is an output of {where}")
        for state in part.states:
            collector.pin(state.before, "fixed", "it is a state")
            collector.pin(state.after, "fixed", "it is a state")
    for _, node in graph.walk():
        collector.visit(node)
    return _solved(graph, collector)


class Collector:
    """What the nodes of an analysed graph say of scales, gathered."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.scales: LogScales[Cell] = LogScales()
        self.layouts: dict[Value, Layout] = {}
        self.reasons: dict[Cell, list[tuple[State, str]]] = defaultdict(list)

    def layout(self, value: Value) -> Layout:
        if value not in self.layouts:
            self.layouts[value] = layout_of(value, self.analysis)
        return self.layouts[value]

    def pin(self, value: Value, state: State, reason: str) -> None:
        """Let all parts of a value have the scale 1."""
        if is_real(value.dtype):
            for cell in self.layout(value).cells:
                self.scales.fix(cell, reason)
                self.reasons[cell].append((state, reason))

    def visit(self, node: Node) -> None:
        scaling = node_scaling(node)
        layouts = [self.layout(o) if isinstance(o, Value) and is_real(o.dtype) else None for o in node.inputs]
        results = [self.layout(value) for value in node.outputs if is_real(value.dtype)]
        for slot in scaling.broken:
            value = node.inputs[slot]
            assert isinstance(value, Value)
            self.pin(value, "broken", f"{node.label} needs it as it is")
        if scaling.starts:
            self._start(node, scaling)
        meeting = Meeting(self._mixed(node))
        given = _Given(scaling, layouts)
        for layout in results if not scaling.starts else ():
            self._pass(layout, given, meeting, _tied(node))
        for value in node.outputs:
            self._share(self.layout(value), given, meeting, alone=not results)
        if scaling.opposed is not None:
            first, second = (given.parts([slot]) for slot in scaling.opposed)
            for (_, a), (_, b) in meeting.together([first, second]):
                self.scales.relate({a: 1, b: 1}, _tied(node))

    def _start(self, node: Node, scaling: NodeScaling) -> None:
        state: State = "broken" if scaling.within is None else "fixed"
        words = f"{node.label} makes it"
        if scaling.within is not None:
            words = f"{node.label} gives numbers between {scaling.within[0]:g} and {scaling.within[1]:g}"
        for value in node.outputs:
            self.pin(value, state, words)

    def _mixed(self, node: Node) -> frozenset[Dim]:
        """The Dims whose indices go through one another in a node, so that parts along them cannot be told apart."""
        call = self.analysis.calls.get(node)
        if call is None:
            return frozenset()
        return frozenset(dim for role, extent in call.roles if role in _MIXING for dim in leaves(extent))

    def _pass(self, result: Layout, given: _Given, meeting: Meeting, by: str) -> None:
        """The relation of each part of a result to the parts of operands that it is made of."""
        for cell in result.cells:
            here = (result, cell)
            choices = [
                meeting.among(given.layouts_of(joint.slots), here) for joint in given.scaling.joints if joint.power
            ]
            powers = [Fraction(joint.power) for joint in given.scaling.joints if joint.power]
            for chosen in meeting.together(choices):
                relation = {cell: Fraction(-1)}
                for (_, operand), power in zip(chosen, powers, strict=True):
                    relation[operand] = relation.get(operand, Fraction(0)) + power
                self.scales.relate(relation, by)
            if given.scaling.bias is not None:
                for _, bias in meeting.among(given.layouts_of([given.scaling.bias]), here):
                    self.scales.relate({cell: 1, bias: -1}, by)

    def _share(self, result: Layout, given: _Given, meeting: Meeting, *, alone: bool) -> None:
        """Operands share a scale of which no result tells, as in a comparison, or not of theirs alone."""
        joints = given.scaling.joints
        for joint in joints:
            if joint.power and not alone and (len(joint.slots) == 1 or len(joints) == 1):
                continue
            for cell in result.cells:
                parts = meeting.among(given.layouts_of(joint.slots), (result, cell))
                for (_, a), (_, b) in pairwise(parts):
                    self.scales.relate({a: 1, b: -1}, "")


def _tied(node: Node) -> str:
    return f"{node.label} ties it to scales that are fixed"


@dataclass(frozen=True)
class _Given:
    """The operands of a node, with their parts."""

    scaling: NodeScaling
    layouts: Sequence[Layout | None]

    def layouts_of(self, slots: Sequence[int]) -> Iterator[Layout]:
        return (layout for slot in slots if (layout := self.layouts[slot]) is not None)

    def parts(self, slots: Sequence[int]) -> list[Part]:
        return [(layout, cell) for layout in self.layouts_of(slots) for cell in layout.cells]


def _in_order(graph: Graph) -> Iterator[Value]:
    """All values, each after what it is computed from, and parameters last."""
    for part in graph.nested():
        yield from part.inputs
    for _, node in graph.walk():
        yield from node.outputs
    yield from graph.all_parameters()


def _solved(graph: Graph, collector: Collector) -> Scales:
    scales = collector.scales
    scales.settle()
    members: dict[Cell, list[tuple[Cell, Fraction]]] = defaultdict(list)
    reasons: dict[Cell, list[tuple[State, str]]] = defaultdict(list)
    for value in _in_order(graph):
        for cell in collector.layout(value).cells if is_real(value.dtype) else ():
            root, power = scales.find(cell)
            members[root].append((cell, power))
            reasons[root] += collector.reasons.get(cell, ())
    weights = {root for root, own in members.items() if all(isinstance(c.value, Parameter) for c, _ in own)}
    ways = scales.freedom(members, weights.__contains__)
    moved = {root for way in ways.values() for root in way}
    found = {}
    for root, parts in members.items():
        why = reasons[root]
        state: State = "moves" if root in moved else why[0][0] if why else "held"
        if any(kind == "broken" for kind, _ in why):
            state = "broken"
        words = [text for _, text in why]
        if not words and state == "held":
            words = [scales.fixed.get(root) or "products with other scales leave no freedom"]
        found[root] = ScaleVariable(parts, state, list(dict.fromkeys(words)))
    for root, way in ways.items():
        found[root].follows = [(found[other], power) for other, power in way.items() if other != root]
    of = {cell: found[root] for root, parts in members.items() for cell, _ in parts}
    return Scales(graph, list(found.values()), of, collector.layouts)
