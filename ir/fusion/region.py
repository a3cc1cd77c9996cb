"""One region: nodes that one kernel may compute, as scalar expressions over loops.

A loop is an atom of an axis: the Dims that the axis rules of the nodes, applied to each other with nothing else known,
leave apart. So a reshape that splits an axis, a permutation and a broadcast are only other ways to read the same loops.
What stands behind a slice, a pad, a concatenation or a window is the expression before it at other places of its loops:
in the end tensors from outside are read there, and each has its index as an affine function of the loops. What kind of
kernel a region is (pointwise, a row reduction, a contraction) is read off its terms, never declared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from regauge.ir.affine import Affine
from regauge.ir.dims.extents import Dim
from regauge.ir.errors import FusionError
from regauge.ir.fusion.terms import BITS, PLACES, Layout, Load, Term, below_results, terms_below
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Operator
from regauge.ir.roofline import VIEWS
from regauge.ir.scalars import element_of
from regauge.ir.sizes.expressions import product, same

if TYPE_CHECKING:
    from regauge.ir.fusion.attention import Attention

__all__ = ["Kind", "Layout", "Load", "Region", "Term", "below_results", "is_view", "no_element", "terms_below"]

Kind: TypeAlias = Literal["pointwise", "row reduction", "contraction", "attention"]


@dataclass(eq=False, repr=False)
class Region:
    """Nodes in topological order, traced: what each computes, over which loops.

    ``returned`` are results that the graph returns, or carries into the next run. ``lengths`` says of loops that go
    through segments, laid end to end, how many indices they have; ``loaded`` are reads, of which some may be needless.
    """

    nodes: tuple[Node, ...]
    returned: frozenset[Value] = frozenset()
    results: dict[Value, Term] = field(default_factory=dict)
    layouts: dict[Value, Layout] = field(default_factory=dict)
    loaded: Sequence[Term] = ()
    lengths: dict[Dim, Affine] = field(default_factory=dict)

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
    def loads(self) -> list[Term]:
        """What is read, in the order in which nodes read it."""
        needed = set(self.terms)
        return [load for load in self.loaded if load in needed]

    @cached_property
    def reductions(self) -> list[Term]:
        totals = set(self.totals)
        return [term for term in self.terms if term.reduces and term not in totals]

    @cached_property
    def totals(self) -> list[Term]:
        """Sums over all rows, with which nothing more is computed: each program adds up those that it has.

        They stand beside a reduction of these rows, or beside a result that has an entry for each index, and keep its
        last axes. So gradients of what rows share are found together with those that each row has for itself.
        """
        reducing = [term for term in self.terms if term.reduces]
        read = {below_results(arg) for term in self.terms if term.op != "result" for arg in term.args}
        last = [term for term in reducing if term.op == "sum" and term not in read]
        if not last or self.shifted or any(map(_contracts, reducing)):
            return []
        columns = self._columns_beside(last, [term.over for term in reducing if term not in last])
        rows = frozenset(self.loops) - columns
        if not columns or not rows:
            return []
        return [term for term in last if term.over == rows and term.args[0].axes == rows | columns]

    def _columns_beside(self, last: Sequence[Term], others: Sequence[frozenset[Dim]]) -> frozenset[Dim]:
        """The loops that rows have beside sums over rows: what ``others`` go over, or the last axes of a result."""
        if others:
            return others[0]
        layouts = [[dim for axis in self.layouts[value] for dim in axis] for value in self.outputs]
        for whole in (layout for layout in layouts if len(layout) == len(self.loops)):
            columns = frozenset(whole) - last[0].over
            if columns and frozenset(whole[-len(columns) :]) == columns:
                return columns
        return frozenset()

    @cached_property
    def whole(self) -> frozenset[Term]:
        """Integers that stay integers: they only name entries, are masks, or are compared with places and numbers."""
        read_as_whole: dict[Term, bool] = {}
        for term in self.terms:
            below = [below_results(arg) for arg in term.args]
            names = set(below[: len(term.value.picked)] if term.op == "load" else below if term.op in BITS else ())
            compared = term.op in COMPARISONS and all(map(_may_be_whole, below))
            for one in below if term.op != "result" else ():
                if _is_integer(one):
                    read_as_whole[one] = read_as_whole.get(one, True) and (compared or one in names)
        return frozenset(one for one, whole in read_as_whole.items() if whole)

    @cached_property
    def contractions(self) -> list[Term]:
        return [term for term in self.reductions if _contracts(term)]

    @cached_property
    def parts(self) -> list[list[Term]]:
        """Contractions by the axes that they give: those of a part have the same tiles, parts lie beside one another
        along columns, as queries, keys and values do where they have not as many heads."""
        parts: dict[frozenset[Dim], list[Term]] = {}
        for term in self.contractions:
            parts.setdefault(term.axes, []).append(term)
        return list(parts.values())

    @property
    def reduces_as_attention(self) -> bool:
        ops = sorted(term.op for term in self.reductions)
        return ops[:1] == ["amax"] and len(ops) > 3 and set(ops[1:]) == {"sum"}

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
        """The loops that reductions go over; of totals alone those that they keep: a program has whole rows."""
        if self.totals and not self.reductions:
            return self.totals[0].axes
        return frozenset(dim for term in self.reductions for dim in term.over)

    @cached_property
    def loops(self) -> list[Dim]:
        """All loops: those of the first output in its order, then others as loads have them."""
        layouts = [dim for value in self.outputs for axis in self.layouts[value] for dim in axis]
        return list(dict.fromkeys([*layouts, *(dim for load in self.loads for dim in load.value.loops)]))

    @cached_property
    def measured(self) -> list[Dim]:
        """Dims that are no loops, but how many indices they have says where something is inside, or can be picked."""
        pairs = [term.value for term in self.terms if term.op == "inside"]
        dims = [dim for pair in pairs for place in pair for dim, _ in place.sizes]
        dims += [dim for load in self.loads for dim in load.value.picked]
        return [dim for dim in dict.fromkeys(dims) if dim not in self.loops]

    @property
    def sized(self) -> list[Dim]:
        """All Dims whose sizes a launch asks for: loops, those that are measured, and the axes of what is read."""
        read = [dim for load in self.loads for axis in load.value.layout for dim in axis]
        return list(dict.fromkeys([*self.loops, *self.measured, *read]))

    @cached_property
    def shifted(self) -> frozenset[Dim]:
        """Loops that places are computed of."""
        places = [place for load in self.loads for _, place in load.value.moved]
        places += [term.value[0] for term in self.terms if term.op == "inside"]
        return frozenset(dim for place in places for dim in place.dims)

    @cached_property
    def has_windows(self) -> bool:
        """Whether what is reduced are windows, of which results have no loop."""
        kept = frozenset(dim for value in self.outputs for dim in self.dims(value))
        return self.kind == "row reduction" and bool(self.reduced & self.shifted) and self.reduced.isdisjoint(kept)

    @cached_property
    def names(self) -> dict[Dim, str]:
        """Names of the loops: ``i0`` and on, ``r0`` for what is reduced; ``s0`` and on for Dims that are measured.

        Of contractions: ``b0`` where both factors have them, ``m0`` of the left one, ``n0`` of the right one, and
        ``k0`` for what is contracted. Of attention ``k0`` is contracted first and ``s0`` then, ``n0`` are of values,
        and ``r0`` and ``v0`` of the latents that keys and values are made of.
        """
        names: dict[Dim, str] = {}
        counts: dict[str, int] = {}
        letters = {dim: self._letter(dim) for dim in self.loops} | dict.fromkeys(self.measured, "s")
        for dim, letter in letters.items():
            counts[letter] = counts.get(letter, -1) + 1
            names[dim] = f"{letter}{counts[letter]}"
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
        return "contraction" if self.contractions else "row reduction" if self.reduced else "pointwise"


COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


def _is_integer(term: Term) -> bool:
    return term.op in PLACES or term.op == "load" and term.value.value.dtype in (torch.int32, torch.int64)


def _may_be_whole(term: Term) -> bool:
    return _is_integer(term) or term.op == "number" and float(term.value).is_integer()


def _contracts(term: Term) -> bool:
    """Whether a sum is one of products whose factors have loops of their own, so that tiles of both are read again."""
    product = below_results(term.args[0])
    if term.op != "sum" or product.op != "mul":
        return False
    left, right = (arg.axes - term.over for arg in product.args)
    return all(arg.axes & term.over for arg in product.args) and bool(left - right) and bool(right - left)


def is_view(node: Node) -> bool:
    """Whether a node only reads its operand in another layout: in torch it moves no data.

    What is expanded and reshaped then torch copies.
    """
    element = element_of(node)
    if element is not None and element.op == "moved" and not element.value.guarded:
        steps = [step for _, place in element.value.places for _, step in place.steps]
        element = element.args[0] if all(step > 0 for step in steps) else element
    if element is None or element.op != "operand":
        return False
    source = node.inputs[element.value]
    if not isinstance(source, Value) or source.dtype != node.output.dtype:
        return False
    if not source.ranked or same(product(source.shape), product(node.output.shape)):
        return True
    return node.op in VIEWS and all(user.op != "reshape" for user, _ in node.output.uses)


def no_element(operator: Operator) -> str:
    """Why a node of an operator is in no region."""
    if operator.element is None:
        return f"what {operator.name} computes for one index is not stated"
    return f"what {operator.name} computes for one index is not stated for such operands and attributes"
