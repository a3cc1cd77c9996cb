"""Tracing: the region of nodes, found by applying their axis rules to one another, with nothing else known.

What stands behind a slice, a pad, a concatenation or a window is the expression before it at other places of its loops:
in the end tensors from outside are read there, and each has its index as an affine function of the loops.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

from regauge.ir.affine import Affine, index_of, length_of
from regauge.ir.atoms import Atoms
from regauge.ir.axis_rules.rules import ENDING_ROLES, Axes, Call
from regauge.ir.dims.axes import apply_rule
from regauge.ir.dims.extents import Concat, Dim, fresh, leaves, resolve, size_of
from regauge.ir.dims.unify import unify
from regauge.ir.dtypes import epsilon_of
from regauge.ir.errors import AxisError, FusionError
from regauge.ir.fusion.region import Region, no_element
from regauge.ir.fusion.terms import DIGITS, Digit, Layout, Load, Mover, Term
from regauge.ir.graph import Node, Value
from regauge.ir.scalars import REDUCTIONS, Along, OperandAxis, Place, Scalar, element_of, movements
from regauge.ir.sizes.expressions import Size, is_static, same


def trace(nodes: Sequence[Node], returned: Iterable[Value] = (), beside: Sequence[Value] = ()) -> Region:
    """The region of nodes, given in topological order; raises FusionError with the reason where there is none.

    Results that stand ``beside`` one another have the same loops on their axes, whatever else connects them, where all
    have the same shape.
    """
    kept = frozenset(node.output for node in nodes if len(node.outputs) == 1).intersection(returned)
    try:
        region = _Tracer(nodes, kept, beside, shared=True).region()
    except _Twice:
        region = None
    if region is not None and not _goes_on(region):
        return region
    try:  # x @ x.T: what is read twice, along other loops
        apart = _Tracer(nodes, kept, beside, shared=False).region()
    except _Twice as error:
        if region is None:
            raise FusionError(str(error)) from error
        return region
    return apart if region is None or apart.attention is not None else region


def _goes_on(region: Region) -> bool:
    """Whether a result has a loop that is reduced, as where keys and values of attention are the same latents."""
    return region.reduces_as_attention and any(region.dims(value) & region.reduced for value in region.outputs)


class _Twice(Exception):
    """A value has the same loop on two axes."""


class _Tracer:
    """Applies the rules of the nodes to one another; with ``shared`` a value from outside has the same loops wherever
    it is read."""

    def __init__(
        self, nodes: Sequence[Node], returned: frozenset[Value], beside: Sequence[Value], *, shared: bool
    ) -> None:
        self.nodes = tuple(nodes)
        self.shared = shared
        self.axes: dict[Any, Axes] = {}
        self.calls: dict[Node, Call] = {}
        for node in self.nodes:
            self._apply(node)
        if all(same_shape(beside[0].shape, other.shape) for other in beside[1:]):
            for first, second in pairwise(beside):
                self._lay_beside(first, second)
        self.atoms, self.mover = Atoms(), Mover()
        self.windows: dict[tuple[Node, Along], Dim] = {}
        self.traced = Region(self.nodes, returned, loaded=self.mover.loads)

    def _key(self, node: Node, slot: int) -> Any:
        value = node.inputs[slot]
        return value if self.shared or value in self.axes else (node, slot)

    def _apply(self, node: Node) -> None:
        if len(node.outputs) != 1 or node.regions:
            raise FusionError(f"{node.op} has {'regions' if node.regions else 'several results'}")
        given: list[Axes | None] = []
        for slot, operand in enumerate(node.inputs):
            if not isinstance(operand, Value):
                given.append(None if operand is None else [])
                continue
            if not operand.ranked:
                raise FusionError(f"the rank of {operand.name} is not known")
            key = self._key(node, slot)
            if key not in self.axes:
                self.axes[key] = [fresh(size) for size in operand.shape]
            given.append(self.axes[key])
        given, apart = self._apart(node, given)
        call = self.calls[node] = Call(node, given)
        try:
            (found,) = apply_rule(node.operator, call)
        except (AxisError, ValueError) as error:
            raise FusionError(f"the axis rule of {node.op} does not fit") from error
        hidden = {dim for extent in apart for dim in leaves(extent)}
        self.axes[node.output] = [
            fresh(size) if isinstance(resolve(extent), Concat) or not hidden.isdisjoint(leaves(extent)) else extent
            for extent, size in zip(found, node.output.shape, strict=True)
        ]

    def _apart(self, node: Node, given: list[Axes | None]) -> tuple[list[Axes | None], Axes]:
        """The axes of operands, with others in place of those that are read elsewhere, and these others.

        What a slice is cut out of, what is padded or laid end to end keeps its own loop, and the result has another: a
        place, not the rule, says how they belong together.
        """
        element = element_of(node)
        read = [] if element is None else movements(element)
        axes = {(one.args[0].value, axis) for one in read for axis, _ in one.value.places}
        if element is not None and element.op == "joined" and len(element.args) > 1:
            axes = {(arg.value, node.attributes["dim"]) for arg in element.args}
        given = [None if own is None else list(own) for own in given]
        apart: Axes = []
        for slot, axis in axes:
            own = given[slot]
            assert own is not None
            own[axis] = fresh(size_of(own[axis]))
            apart.append(own[axis])
        return given, apart

    def _lay_beside(self, first: Value, second: Value) -> None:
        try:
            for own, other in zip(self.axes[first], self.axes[second], strict=True):
                unify(own, other)
        except (AxisError, ValueError) as error:
            raise FusionError(f"{first.name} and {second.name} have other loops") from error

    def region(self) -> Region:
        for node in self.nodes:
            self._trace(node)
        return self.traced

    def _trace(self, node: Node) -> None:
        element = element_of(node)
        if element is None:
            raise FusionError(no_element(node.operator))
        region, value = self.traced, node.output
        layout = region.layouts[value] = self._layout(value, value.name)
        ends = [dim for role, e in self.calls[node].roles if role in ENDING_ROLES for dim in self.atoms.of(e)]
        ends += [dim for one in movements(element) for dim in self._inner(one, node)]
        term = self._term(element, node, frozenset(ends), {})
        if not term.axes <= {dim for axis in layout for dim in axis}:
            raise FusionError(f"{node.op} moves indices across axes")
        region.results[value] = Term("result", (term,), term.axes, value)

    def _digit(self, op: str, node: Node, args: tuple[Term, ...], base: int) -> Term:
        """What the last axis of the result has beyond that of operands is the loop over digits."""
        axes = frozenset(dim for arg in args for dim in arg.axes)
        last = self.traced.layouts[node.output][-1]
        more = [dim for dim in last if dim not in axes]
        if len(more) != 1 or more[0] is not last[-1] or not isinstance(more[0].size, int):
            raise FusionError(f"the digits of {node.output.name} lie on several axes")
        return Term(op, args, axes | {more[0]}, Digit(base, more[0], more[0].size))

    def _layout(self, key: Any, name: str) -> Layout:
        layout = tuple(self.atoms.of(extent) for extent in self.axes[key])
        dims = [dim for axis in layout for dim in axis]
        if len(set(dims)) != len(dims):
            raise _Twice(f"{name} has the same loop on two axes")
        return layout

    # -- other places ------------------------------------------------------------------------------------------------

    def _loops(self, along: Along, node: Node) -> tuple[Dim, ...]:
        """The loops of an index that a place depends on."""
        if along.window is not None:
            return (self.windows.setdefault((node, along), Dim(along.window)),) if along.window > 1 else ()
        key = node.output if along.slot is None else self._key(node, along.slot)
        return self.atoms.of(self.axes[key][along.axis])

    def _inner(self, moved: Scalar, node: Node) -> list[Dim]:
        """The loops of windows, which places depend on and the result has not."""
        alongs = [along for _, place in moved.value.places for along, _ in place.steps]
        return [dim for along in alongs if along.slot is not None or along.window for dim in self._loops(along, node)]

    def _place(self, place: Place, node: Node, length: Affine) -> Affine:
        found = length.times(place.lengths) + Affine(offset=place.offset)
        for along, step in place.steps:
            outer, *inner = self._loops(along, node) or (None,)
            if not all(is_static(dim.size) for dim in inner):
                raise FusionError(f"an axis that {node.op} reads elsewhere has loops of dynamic sizes")
            for dim in reversed(inner):
                found += index_of(dim).times(step)
                step *= int(dim.size)
            found += index_of(outer).times(step) if outer is not None else Affine()
        return found

    def _elsewhere(self, scalar: Scalar, node: Node) -> Term:
        """An operand at other places, or whether these are on its axes."""
        (operand,) = scalar.args
        name = node.inputs[operand.value].name
        term, layout = self._operand(node, operand.value), self._layout(self._key(node, operand.value), name)
        moved: dict[Dim, Affine] = {}
        guards: dict[Dim, Term] = {}
        insides: list[Term] = []
        for axis, place in scalar.value.places:
            own = layout[axis]
            if len(own) > 1:
                raise FusionError(f"an axis of {name} is several loops where {node.op} reads it elsewhere")
            length = length_of(own) if own else Affine(offset=1)
            found = self._place(place, node, length)
            insides.append(self.mover.inside(found, length))
            if own:
                moved[own[0]], guards[own[0]] = found, insides[-1]
        if scalar.op == "moved":
            return self.mover.moved(term, moved, guards if scalar.value.guarded else {})
        return reduce(lambda x, y: Term("logical_and", (x, y), x.axes | y.axes), insides)

    def _picked(self, scalar: Scalar, node: Node) -> Term:
        """The entries of an operand whose numbers another one holds."""
        table, numbers = (self._operand(node, arg.value) for arg in scalar.args)
        value = node.inputs[scalar.args[0].value]
        assert isinstance(value, Value)
        own = self._layout(self._key(node, scalar.args[0].value), value.name)[scalar.value.axis]
        if len(own) > 1:
            raise FusionError(f"an axis of {value.name} is several loops where {node.op} looks entries up in it")
        return self.mover.picked(table, own[0], numbers) if own else table

    def _compact(self, scalar: Scalar, node: Node) -> Term:
        """The entries of an operand that a mask and the places where its groups begin say."""
        values, mask, starts = (self._operand(node, arg.value) for arg in scalar.args)
        value = node.inputs[scalar.args[0].value]
        assert isinstance(value, Value)
        (loops,) = self._layout(self._key(node, scalar.args[0].value), value.name)
        if len(loops) != 1:
            raise FusionError(f"{value.name} is not one row of entries")
        rank, bit = self._digit("rank", node, (starts, mask), 2), self._digit("bit", node, (mask,), 2)
        return self.mover.compact(values, loops[0], rank, bit)

    def _joined(self, slots: Sequence[int], node: Node) -> Term:
        """Of operands that are laid end to end along the axis that the node names the one where the index lies."""
        axis = node.attributes["dim"]
        joint, *inner = self.traced.layouts[node.output][axis] or (None,)
        if joint is None or len(slots) == 1:
            return self._operand(node, slots[0])
        parts: list[tuple[Term, Term]] = []
        place = index_of(joint)
        for slot in slots:
            term, key = self._operand(node, slot), self._key(node, slot)
            outer, rest = _before(self._layout(key, node.output.name)[axis], inner)
            if rest != inner or len(outer) > 1:
                raise FusionError(f"an axis of {node.output.name} is several loops where segments are laid end to end")
            length = length_of(outer) if outer else Affine(offset=1)
            inside = self.mover.inside(place, length)
            parts.append((inside, self.mover.moved(term, dict.fromkeys(outer, place), dict.fromkeys(outer, inside))))
            place -= length
        self.traced.lengths[joint] = index_of(joint) - place
        found = parts.pop()[1]
        for inside, part in reversed(parts):
            found = self.mover.chosen(inside, part, found)
        return found

    # -- terms -------------------------------------------------------------------------------------------------------

    def _term(self, scalar: Scalar, node: Node, ended: frozenset[Dim], known: dict[Scalar, Term]) -> Term:
        if scalar not in known:
            known[scalar] = self._made(scalar, node, ended, known)
        return known[scalar]

    def _made(self, scalar: Scalar, node: Node, ended: frozenset[Dim], known: dict[Scalar, Term]) -> Term:
        match scalar.op:
            case "operand":
                return self._operand(node, scalar.value)
            case "number":
                return Term("number", value=scalar.value)
            case "count":
                return Term("count", over=ended if scalar.value is None else frozenset(self._axis(node, scalar.value)))
            case "epsilon":
                return Term("number", value=epsilon_of(node.output.dtype))
            case "joined":
                return self._joined([arg.value for arg in scalar.args], node)
            case "moved" | "inside":
                return self._elsewhere(scalar, node)
            case "picked":
                return self._picked(scalar, node)
            case "compact":
                return self._compact(scalar, node)
            case "index" | "from_end":
                dims = self._axis(node, scalar.value)
                return Term(scalar.op, axes=frozenset(dims), value=dims)
        args = tuple(self._term(arg, node, ended, known) for arg in scalar.args)
        if scalar.op == "where":
            return self.mover.chosen(*args)
        axes = frozenset(dim for arg in args for dim in arg.axes)
        if scalar.op in DIGITS:
            return self._digit(scalar.op, node, args, scalar.value or 2)
        if scalar.op in REDUCTIONS:
            ended = ended if scalar.value is None else frozenset(self._axis(node, scalar.value))
            return Term(scalar.op, args, axes - ended, over=ended) if ended else args[0]
        return Term(scalar.op, args, axes)

    def _axis(self, node: Node, axis: OperandAxis) -> tuple[Dim, ...]:
        """The loops of an axis of an operand, or of the result, the slowest first."""
        slot, place = axis
        return self.atoms.of(self.axes[node.output if slot is None else self._key(node, slot)][place])

    def _operand(self, node: Node, slot: int) -> Term:
        value = node.inputs[slot]
        assert isinstance(value, Value)
        if value in self.traced.results:
            return self.traced.results[value]
        key = self._key(node, slot)
        return self.mover.load(key, Load(value, self._layout(key, value.name)))


def same_shape(shape: Sequence[Size], other: Sequence[Size]) -> bool:
    return len(shape) == len(other) and all(map(same, shape, other))


def _before(loops: Sequence[Dim], inner: Sequence[Dim]) -> tuple[list[Dim], list[Dim]]:
    """Loops of an axis apart: those before the last ones, of which there are as many as ``inner`` ones."""
    place = max(0, len(loops) - len(inner))
    return list(loops[:place]), list(loops[place:])
