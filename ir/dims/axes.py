"""The axis analysis: one walk over a graph gives every value its extents, every node its roles and derived sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from regauge.ir.axis_rules.rules import ENDING_ROLES, Axes, Call
from regauge.ir.collection import without_collection
from regauge.ir.dims.extents import Concat, Dim, Extent, Product, format_extent, fresh, leaves, pin, resolve, size_of
from regauge.ir.dims.groups import Group, Member
from regauge.ir.dims.masking import pin_felt
from regauge.ir.dims.positions import pin_positions
from regauge.ir.dims.unify import unify
from regauge.ir.errors import AxisError, RegaugeError
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.operator import Operator
from regauge.ir.sizes.expressions import may_be_same, same


class ValueAxes(dict[Value, Axes]):
    """The extents of values; a parameter has Dims of its own from the moment somebody asks for them."""

    def __missing__(self, value: Value) -> Axes:
        if not isinstance(value, Parameter):
            raise KeyError(value)
        axes = self[value] = [fresh(size) for size in value.shape]
        return axes


@dataclass
class Analysis:
    """What the axis algebra knows about a graph.

    ``of[value]`` are the extents of a value, one per axis (read them through ``axes(value)``); ``calls[node]`` holds
    the roles a node gives to axes and the attributes that are sizes; ``problems`` the nodes whose rule did not fit.
    ``groups[dim]`` are the places in parameters where a Dim occurs, those in trained parameters first; ``held`` the
    Dims of trained parameters and buffers; ``majors`` what was asked of :mod:`regauge.ir.dims.majors` so far.
    """

    of: ValueAxes = field(default_factory=ValueAxes)
    calls: dict[Node, Call] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    groups: dict[Dim, Group] = field(default_factory=dict)
    held: set[Dim] = field(default_factory=set)
    majors: dict[Dim, tuple[Dim, ...]] = field(default_factory=dict)
    _all_named: bool = False

    @cached_property
    def ends(self) -> list[tuple[Node, str, list[Dim]]]:
        """Where Dims end: contracted, reduced or normalised over, once the whole graph is analysed."""
        return [
            (node, role, leaves(extent))
            for node, call in self.calls.items()
            for roles, extents in call.stated
            for role, extent in zip(roles, extents, strict=True)
            if role in ENDING_ROLES
        ]

    def axes(self, value: Value) -> list[Extent]:
        """The extents of a value in normal form."""
        self.name_values()
        return [resolve(extent) for extent in self.of[value]]

    def describe(self, value: Value) -> str:
        self.name_values()
        return "[" + ", ".join(format_extent(extent) for extent in self.of[value]) + "]"

    def name_values(self) -> None:
        """Name the Dims that no parameter has: only when somebody looks, since there are many."""
        if not self._all_named:
            self._all_named = True
            for value, axes in self.of.items():
                _name_dims(value, [leaves(extent) for extent in axes])


def analyse(graph: Graph, *, strict: bool = False) -> Analysis:
    """Infer the extents of every value. With ``strict`` a rule that does not fit raises, else its node is opaque."""
    with without_collection():
        analysis = infer_axes(graph, strict=strict)
        pin_positions(analysis)
        pin_felt(analysis)
        return analysis


def infer_axes(graph: Graph, *, strict: bool = False) -> Analysis:
    """What the rules of the nodes say, without the pins that come of how the whole graph uses its weights.

    Those are for :func:`analyse`; the laws of operators (:mod:`regauge.ir.laws.operators`) ask about one rule alone.
    """
    analysis = Analysis()
    reasons = graph.metadata.get("input_reasons", {})
    for value in graph.inputs:
        axes = [fresh(size) for size in value.shape]
        for extent in axes:
            pin(extent, reasons.get(value.name, "it is an axis of a graph input"), value.name)
        analysis.of[value] = axes
    _walk(graph, analysis, strict)
    for output in graph.outputs:
        if isinstance(output, Value):
            for extent in analysis.of[output]:
                pin(extent, "it is an axis of a graph output", output.name)
    _pin_unread(graph, analysis)
    _gather_groups(graph, analysis)
    return analysis


def _gather_groups(graph: Graph, analysis: Analysis) -> None:
    """Fill ``groups`` and ``held``, and name each Dim after the parameter in which it occurs first."""
    groups, held = analysis.groups, analysis.held
    for parameter in sorted(graph.all_parameters(), key=lambda p: p.kind != "parameter"):
        is_held = parameter.kind != "constant"
        for axis, extent in enumerate(analysis.of[parameter]):
            member = Member(parameter, axis)
            found = resolve(extent)
            if isinstance(found, Dim):  # nearly always, so without the list that leaves() makes
                _enter(groups, found, member, "")
                if is_held:
                    held.add(found)
                continue
            dims = leaves(found)
            for place, dim in enumerate(dims):
                _enter(groups, dim, member, f".{place}" if len(dims) > 1 else "")
            if is_held:
                held.update(dims)


def _pin_unread(graph: Graph, analysis: Analysis) -> None:
    """Parameters that nothing reads keep their shape: cutting them would save nothing that runs."""
    unread = [parameter for parameter in graph.all_parameters() if not parameter.uses]
    returned = {output for part in graph.nested() for output in part.outputs} if unread else set()
    for parameter in unread:
        if parameter not in returned:
            for extent in analysis.of[parameter]:
                pin(extent, "no node reads it", parameter.name)


def _enter(groups: dict[Dim, Group], dim: Dim, member: Member, place: str) -> None:
    """Note that a Dim occurs on the axis of a parameter, at a place of it where it has several."""
    group = groups.get(dim)
    if group is None:
        groups[dim] = Group(dim, [member])
        if not dim.name:
            dim.name = f"{member.parameter.name}:{member.axis}{place}"
    elif group.members[-1] is not member:
        group.members.append(member)


def _walk(graph: Graph, analysis: Analysis, strict: bool) -> None:
    """Analyse nodes and states of a graph or region whose inputs already have extents."""
    for node in graph.nodes:
        _visit(node, analysis, strict)
    for state in graph.states:
        for before, after in zip(analysis.of[state.before], analysis.of[state.after], strict=True):
            if may_be_same(size_of(before), size_of(after)):  # a cache grows along an axis
                unify(before, after)


def _visit(node: Node, analysis: Analysis, strict: bool) -> None:
    of = analysis.of
    operands = [of[operand] if isinstance(operand, Value) else _no_axes(operand) for operand in node.inputs]
    call = RegionCall(node, operands, analysis=analysis, strict=strict) if node.regions else Call(node, operands)
    operator = node.operator
    try:
        results = apply_rule(operator, call)
        _check_results(node, results)
    except AxisError as error:
        problem = str(error) if str(error).startswith(node.label) else f"{node.label}: {error}"
        if strict:
            raise AxisError(problem) from error
        analysis.problems.append(problem)
        results = call.opaque(f"the axis rule of {node.op} does not fit: {error}")
    if node.metadata:
        _pin_fixed(call, node.metadata)
    analysis.calls[node] = call
    for value, axes in zip(node.outputs, results, strict=True):
        analysis.of[value] = axes


def _pin_fixed(call: Call, metadata: Mapping[str, str]) -> None:
    """Where a node cannot be rewritten (``fixed``), the sizes in its attributes and the constants it reads stay.

    ``fixed_constants`` says so of the constants only: those that a frontend made up and no file holds.
    """
    reason = metadata.get("fixed", metadata.get("fixed_constants"))
    if reason is None:
        return
    for operand, axes in zip(call.node.inputs, call.axes, strict=True):
        if isinstance(operand, Parameter) and operand.kind == "constant":
            for extent in axes or ():
                call.pin(extent, reason)
    if "fixed" in metadata:
        for extent in _extents_in(list(call.derived.values())):
            call.pin(extent, reason)


def _extents_in(derived: Any) -> Iterator[Extent]:
    if isinstance(derived, Dim | Product | Concat):
        yield derived
    elif isinstance(derived, tuple | list):
        for part in derived:
            yield from _extents_in(part)


def apply_rule(operator: Operator, call: Call) -> list[Axes]:
    """The extents of a node's results, by its operator's rule."""
    rule = operator.rule if isinstance(operator.rule, str) else _rule_of(operator.rule, call)
    if isinstance(rule, str):
        return call.apply(rule)
    if rule and not isinstance(rule[0], list):
        return [list(rule)]
    return [[]] if not rule and len(call.node.outputs) == 1 else list(rule)


def _rule_of(function: Callable[[Call], Any], call: Call) -> Any:
    """What a rule function says of a call; one that fails is a rule that does not fit, whatever it fails with."""
    try:
        return function(call)
    except RegaugeError:
        raise
    except Exception as error:
        raise AxisError(f"{call.where}: its rule fails with {type(error).__name__}: {error}") from error


def _check_results(node: Node, results: Sequence[Axes]) -> None:
    if len(results) != len(node.outputs):
        raise AxisError(f"{node.label}: the rule gives {len(results)} results, the node has {len(node.outputs)}")
    for value, axes in zip(node.outputs, results, strict=True):
        sizes = tuple([extent.size or size_of(extent) for extent in axes])
        if sizes == value.shape:
            continue
        if len(sizes) != value.rank or not all(same(a, b) for a, b in zip(sizes, value.shape, strict=True)):
            raise AxisError(f"{node.label}: the rule gives the shape {list(sizes)}, the node has {list(value.shape)}")


def _no_axes(operand: Any) -> Axes | None:
    """A number has no axes; an absent operand (None) has not even none."""
    return None if operand is None else []


@dataclass(slots=True, eq=False)
class RegionCall(Call):
    """A Call that can also analyse the regions of its node (If, Loop, Scan, cond)."""

    analysis: Analysis = field(default_factory=Analysis)
    strict: bool = False

    def region(self, index: int, inputs: Sequence[Axes]) -> list[Axes]:
        """The extents of a region's outputs when its inputs have the given extents."""
        region = self.node.regions[index]
        if len(inputs) != len(region.inputs):
            raise AxisError(f"{self.where}: region {index} takes {len(region.inputs)} inputs, got {len(inputs)}")
        for value, axes in zip(region.inputs, inputs, strict=True):
            self.analysis.of[value] = axes
        _walk(region, self.analysis, self.strict)
        return [self.analysis.of[output] if isinstance(output, Value) else [] for output in region.outputs]


def _name_dims(value: Value, axes: Sequence[Sequence[Dim]]) -> None:
    """Name each Dim that has no name after an axis in which it occurs: ``conv1.weight:0``.

    Where an axis has several Dims, they are counted from the left: ``attn.qkv.weight:0.1``.
    """
    for axis, dims in enumerate(axes):
        for place, dim in enumerate(dims):
            if not dim.name:
                dim.name = f"{value.name}:{axis}.{place}" if len(dims) > 1 else f"{value.name}:{axis}"
