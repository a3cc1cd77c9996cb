"""One region: nodes that one kernel may compute, as scalar expressions over loops.

A loop is an atom of an axis: the Dims that the axis rules of the nodes, applied to each other with nothing else known,
leave apart. So a reshape that splits an axis, a permutation and a broadcast are only other ways to read the same loops,
and what kind of kernel a region is (pointwise, a row reduction, a contraction) is read off its terms, never declared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from regauge.ir.axes import apply_rule
from regauge.ir.dtypes import epsilon_of
from regauge.ir.errors import AxisError, FusionError
from regauge.ir.extents import Concat, Dim, Extent, Product, fresh, resolve, size_of
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Operator
from regauge.ir.roofline import VIEWS
from regauge.ir.rules import ENDING_ROLES, Axes, Call
from regauge.ir.scalars import REDUCTIONS, OperandAxis, Scalar, element_of
from regauge.ir.sizes import product, same
from regauge.ir.unify import unify

if TYPE_CHECKING:
    from regauge.ir.fusion.attention import Attention

Kind: TypeAlias = Literal["pointwise", "row reduction", "contraction", "attention"]
Layout: TypeAlias = tuple[tuple[Dim, ...], ...]
"""For each axis of a tensor the loops that it is made of, the slowest first; none for an axis of size 1."""


@dataclass(frozen=True, eq=False, slots=True)
class Term:
    """A number for each index of its loops ``axes``.

    ``op`` is a primitive or a reduction of :mod:`regauge.ir.scalars`, with ``args``, or one of

    ``number``  ``value`` is the number
    ``count``   how many indices the loops ``over`` have together
    ``index``   the place along an axis that is made of the loops ``value``, the slowest first
    ``load``    what a tensor from outside the region holds; ``value`` is a :class:`Load`
    ``result``  what a node gives: its argument, as a number of the type of ``value``, a graph Value
    ``joined``  of its arguments the one in whose segment of the loop ``value`` the index lies
    """

    op: str
    args: tuple[Term, ...] = ()
    axes: frozenset[Dim] = frozenset()
    value: Any = None
    over: frozenset[Dim] = frozenset()

    @property
    def reduces(self) -> bool:
        return self.op in REDUCTIONS and bool(self.over)


@dataclass(frozen=True, slots=True)
class Load:
    """A tensor from outside that the region reads, and the loops of its axes."""

    value: Value
    layout: Layout


@dataclass(eq=False, repr=False)
class Region:
    """Nodes in topological order, traced: what each computes, over which loops.

    ``returned`` are results that the graph returns, or carries into the next run. ``joints`` are loops that go through
    segments laid end to end, each with the loops of these, which are known where the joint one is.
    """

    nodes: tuple[Node, ...]
    returned: frozenset[Value] = frozenset()
    results: dict[Value, Term] = field(default_factory=dict)
    layouts: dict[Value, Layout] = field(default_factory=dict)
    loads: list[Term] = field(default_factory=list)
    joints: dict[Dim, tuple[Dim, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Region {self.kind}: {' '.join(node.op for node in self.nodes)}>"

    @cached_property
    def outputs(self) -> list[Value]:
        """The results that are read outside of the region, or by nobody."""
        inside = set(self.nodes)
        return [
            node.output
            for node in self.nodes
            if node.output in self.returned
            or not node.output.uses
            or any(user not in inside for user, _ in node.output.uses)
        ]

    def dims(self, value: Value) -> frozenset[Dim]:
        """The loops that a result has."""
        return frozenset(dim for axis in self.layouts[value] for dim in axis)

    @cached_property
    def terms(self) -> list[Term]:
        """All terms that outputs need, arguments before what they are arguments of."""
        seen: dict[Term, None] = {}
        stack = [(self.results[value], False) for value in reversed(self.outputs)]
        while stack:
            term, ready = stack.pop()
            if ready:
                seen[term] = None
            elif term not in seen:
                stack.append((term, True))
                stack.extend((arg, False) for arg in reversed(term.args))
        return list(seen)

    @cached_property
    def reductions(self) -> list[Term]:
        return [term for term in self.terms if term.reduces]

    @cached_property
    def contractions(self) -> list[Term]:
        return [term for term in self.reductions if _contracts(term)]

    @property
    def reduces_as_attention(self) -> bool:
        return sorted(term.op for term in self.reductions) == ["amax", "sum", "sum", "sum"]

    @cached_property
    def attention(self) -> Attention | None:
        """The parts of attention, where that is what the region computes."""
        from regauge.ir.fusion.attention import find_attention  # which reads regions

        try:
            return find_attention(self) if self.reduces_as_attention else None
        except FusionError:
            return None

    @cached_property
    def reduced(self) -> frozenset[Dim]:
        """The loops that reductions go over."""
        return frozenset(dim for term in self.reductions for dim in term.over)

    @cached_property
    def loops(self) -> list[Dim]:
        """All loops: those of the first output in its order, then others as loads have them."""
        layouts = [*(self.layouts[value] for value in self.outputs), *(load.value.layout for load in self.loads)]
        joint_of = {part: joint for joint, parts in self.joints.items() for part in parts}
        return list(dict.fromkeys(joint_of.get(dim, dim) for layout in layouts for axis in layout for dim in axis))

    @cached_property
    def names(self) -> dict[Dim, str]:
        """Names of the loops: ``i0`` and on, ``r0`` for what is reduced; ``i0_0`` is the first segment of ``i0``.

        Of contractions: ``b0`` where both factors have them, ``m0`` of the left one, ``n0`` of the right one, and
        ``k0`` for what is contracted. Of attention ``k0`` is contracted first and ``s0`` then, ``n0`` are of values.
        """
        names: dict[Dim, str] = {}
        counts: dict[str, int] = {}
        for dim in self.loops:
            letter = self._letter(dim)
            counts[letter] = counts.get(letter, -1) + 1
            names[dim] = f"{letter}{counts[letter]}"
            names.update({part: f"{names[dim]}_{i}" for i, part in enumerate(self.joints.get(dim, ()))})
        return names

    def _letter(self, dim: Dim) -> str:
        if self.attention is not None:
            return self.attention.letter(dim)
        if not self.contractions:
            return "r" if dim in self.reduced else "i"
        contraction = self.contractions[0]
        left, right = (factor.axes for factor in below_results(contraction.args[0]).args)
        if dim in contraction.over:
            return "k"
        return "b" if dim in left & right else "m" if dim in left else "n"

    @property
    def kind(self) -> Kind:
        if self.attention is not None:
            return "attention"
        return "contraction" if self.contractions else "row reduction" if self.reductions else "pointwise"


def _contracts(term: Term) -> bool:
    """Whether a sum is one of products whose factors have loops of their own, so that tiles of both are read again."""
    product = below_results(term.args[0])
    if term.op != "sum" or product.op != "mul":
        return False
    left, right = (arg.axes - term.over for arg in product.args)
    return all(arg.axes & term.over for arg in product.args) and bool(left - right) and bool(right - left)


def below_results(term: Term) -> Term:
    while term.op == "result":
        (term,) = term.args
    return term


def terms_below(term: Term) -> set[Term]:
    """The terms that a term is computed from."""
    found: set[Term] = set()
    stack = list(term.args)
    while stack:
        one = stack.pop()
        if one not in found:
            found.add(one)
            stack.extend(one.args)
    return found


def is_view(node: Node) -> bool:
    """Whether a node only reads its operand in another layout: in torch it moves no data.

    What is expanded and reshaped then torch copies.
    """
    element = element_of(node)
    if element is None or element.op != "operand":
        return False
    source = node.inputs[element.value]
    if not isinstance(source, Value) or source.dtype != node.output.dtype:
        return False
    if not source.ranked or same(product(source.shape), product(node.output.shape)):
        return True
    return node.op in VIEWS and all(user.op != "reshape" for user, _ in node.output.uses)


def trace(nodes: Sequence[Node], returned: Iterable[Value] = (), beside: Sequence[Value] = ()) -> Region:
    """The region of nodes, given in topological order; raises FusionError with the reason where there is none.

    Results that stand ``beside`` one another have the same loops on their axes, whatever else connects them.
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
        for first, second in pairwise(beside):
            self._lay_beside(first, second)
        self.traced = Region(self.nodes, returned)
        self.loaded: dict[Any, Term] = {}

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
        call = self.calls[node] = Call(node, given)
        try:
            (self.axes[node.output],) = apply_rule(node.operator, call)
        except (AxisError, ValueError) as error:
            raise FusionError(f"the axis rule of {node.op} does not fit") from error

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
        ends = [extent for role, extent in self.calls[node].roles if role in ENDING_ROLES]
        ended = [dim for extent in ends for dim in self._atoms(extent, value.name)]
        term = self._term(element, node, frozenset(ended), {})
        if not term.axes <= {dim for axis in layout for dim in axis}:
            raise FusionError(f"{node.op} moves indices across axes")
        region.results[value] = Term("result", (term,), term.axes, value)

    def _joined(self, node: Node, args: tuple[Term, ...]) -> Term:
        """What is laid end to end along the axis that the node names, of one loop for each argument."""
        (joint,) = self.traced.layouts[node.output][node.attributes["dim"]] or (None,)
        if len(args) == 1:
            return args[0]
        parts = self.traced.joints.get(joint, ()) if joint is not None else ()
        if len(parts) != len(args) or any(part not in arg.axes for part, arg in zip(parts, args, strict=True)):
            raise FusionError(f"an axis of {node.output.name} has segments, laid end to end")
        axes = frozenset(dim for arg in args for dim in arg.axes).difference(parts)
        return Term("joined", args, axes | {joint}, joint)

    def _layout(self, key: Any, name: str) -> Layout:
        layout = tuple(tuple(self._atoms(extent, name)) for extent in self.axes[key])
        dims = [dim for axis in layout for dim in axis]
        if len(set(dims)) != len(dims):
            raise _Twice(f"{name} has the same loop on two axes")
        return layout

    def _atoms(self, extent: Extent, name: str) -> Iterator[Dim]:
        found = resolve(extent)
        if isinstance(found, Concat):
            yield self._joint(found, name)
            return
        for part in found.factors if isinstance(found, Product) else (found,):
            if isinstance(part, Dim):
                yield part
            else:
                yield from self._atoms(part, name)

    def _joint(self, extent: Concat, name: str) -> Dim:
        """The loop that goes through segments, the same for all axes that have them."""
        parts = tuple(part for part in extent.segments if isinstance(part, Dim))
        for joint, known in self.traced.joints.items():
            if known == parts:
                return joint
        taken = {part for known in self.traced.joints.values() for part in known}
        if len(set(parts)) < len(extent.segments) or not parts or not taken.isdisjoint(parts):
            raise FusionError(f"an axis of {name} has segments, laid end to end")
        joint = Dim(size_of(extent))
        self.traced.joints[joint] = parts
        return joint

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
                return Term("count", over=ended)
            case "epsilon":
                return Term("number", value=epsilon_of(node.output.dtype))
            case "index":
                dims = self._axis(node, scalar.value)
                return Term("index", axes=frozenset(dims), value=dims)
        args = tuple(self._term(arg, node, ended, known) for arg in scalar.args)
        if scalar.op == "joined":
            return self._joined(node, args)
        axes = frozenset(dim for arg in args for dim in arg.axes)
        if scalar.op in REDUCTIONS:
            ended = ended if scalar.value is None else frozenset(self._axis(node, scalar.value))
            return Term(scalar.op, args, axes - ended, over=ended) if ended else args[0]
        return Term(scalar.op, args, axes)

    def _axis(self, node: Node, axis: OperandAxis) -> tuple[Dim, ...]:
        """The loops of an axis of an operand, the slowest first."""
        slot, place = axis
        extent = self.axes[self._key(node, slot)][place]
        return tuple(self._atoms(extent, node.output.name))

    def _operand(self, node: Node, slot: int) -> Term:
        value = node.inputs[slot]
        assert isinstance(value, Value)
        if value in self.traced.results:
            return self.traced.results[value]
        key = self._key(node, slot)
        if key not in self.loaded:
            layout = self._layout(key, value.name)
            self.loaded[key] = Term(
                "load", axes=frozenset(dim for axis in layout for dim in axis), value=Load(value, layout)
            )
            self.traced.loads.append(self.loaded[key])
        return self.loaded[key]


def no_element(operator: Operator) -> str:
    """Why a node of an operator is in no region."""
    if operator.element is None:
        return f"what {operator.name} computes for one index is not stated"
    return f"what {operator.name} computes for one index is not stated for such operands and attributes"
