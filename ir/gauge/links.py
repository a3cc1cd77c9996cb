"""Links places of tensors that share a map of a Dim: one walk over a graph, in which each node's own rule is asked.

A place is one occurrence of a Dim on an axis of a value. Places that a node lines up are linked, on the same side or on
opposite ones: two factors that are contracted take inverse transposes of each other. Places that are linked to
themselves on opposite sides admit only maps that are their own inverse transpose, which are orthogonal.

A product that holds the Dim in both factors and in the result relates three scales. Where one factor is a parameter
that nothing else reads, it takes up what the other factor and the result are scaled by; else one of the three has to
be fixed already for the other two to be linked, or all are fixed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from regauge.ir.axis_rules.rules import Axes
from regauge.ir.dims.extents import Concat, Dim, Extent, Product, leaves, resolve
from regauge.ir.dims.local_axes import LocalAxes, local_axes
from regauge.ir.dtypes import is_real
from regauge.ir.gauge.classes import ANY, DIAGONAL, ROTATION, DimAt, Gauge, dims_at, gauge_in_words
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.operator import Symmetry, symmetry_of

Place: TypeAlias = tuple[Value, int, int]  # value, axis, which leaf of the axis's extent
Signed: TypeAlias = tuple[Place, int]  # +1: it takes the map, -1: the inverse transpose

GAINED_NORMS = ("layer_norm", "rms_norm", "group_norm", "instance_norm")  # result = weight * (x normalised) + bias
_LIMITS = 3  # reasons kept of a frame


class Trio(NamedTuple):
    """The scale of ``result`` is that of ``a`` times that of ``b``."""

    a: Place
    b: Place
    result: Place
    node: Node


class Absorber(NamedTuple):
    """A gain: the places that it consists of, with their sides, and those of what it reads and of what it writes."""

    members: list[Signed]
    read: Place
    written: Place


class Links:
    """Places of a graph's parameter Dims, put together by what its nodes let through."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.analysis = graph, graph.axes
        self.tracked = {d for d in self.analysis.groups if isinstance(d.size, int) and d.size > 1}
        self._parent: dict[Place, Signed] = {}
        self._gauge: dict[Place, Gauge] = {}
        self._limits: dict[Place, tuple[str, ...]] = {}
        self._trios: list[Trio] = []
        self._stored: set[Value] = set()  # parameters, and what is computed of them alone
        self.absorbers: list[Absorber] = []
        self.on_both_sides: list[Place] = []  # of frames with values that are contracted with one another
        self._walk()
        self._settle()

    # -- what was found ------------------------------------------------------------------------------------------------

    def members(self) -> Iterator[tuple[Place, Place, int]]:
        """Every place with the root that stands for its frame, and its side; without those of gains."""
        gains = {self.find(members[0][0])[0] for members, _, _ in self.absorbers}
        for place in self._parent:
            root, sign = self.find(place)
            if root not in gains:
                yield place, root, sign

    def holds(self, place: Place) -> bool:
        """Whether a place lies on a Dim of parameters."""
        return place in self._parent

    def dim(self, place: Place) -> Dim:
        value, axis, number = place
        return leaves(self.analysis.of[value][axis])[number]

    def gauge(self, root: Place) -> Gauge:
        return self._gauge[root]

    def limits(self, root: Place) -> tuple[str, ...]:
        return self._limits.get(root, ())

    # -- links ---------------------------------------------------------------------------------------------------------

    def find(self, place: Place) -> Signed:
        """The root of a place, and on which side of it the place is."""
        chain, sign = [], 1
        while (parent := self._parent[place])[0] != place:
            chain.append((place, sign))
            place, sign = parent[0], sign * parent[1]
        for link, before in chain:
            self._parent[link] = place, sign * before
        return place, sign

    def restrict(self, place: Place, gauge: Gauge, why: str) -> None:
        root, _ = self.find(place)
        before = self._gauge[root]
        self._gauge[root] = before & gauge
        if self._gauge[root] != before and len(self.limits(root)) < _LIMITS:
            self._limits[root] = (*self.limits(root), why)

    def fix(self, places: Sequence[Place], why: str) -> None:
        for place in places:
            self.restrict(place, Gauge.PERMUTE, why)

    def link(self, a: Place, b: Place, side: int, why: str) -> None:
        (first, left), (second, right) = self.find(a), self.find(b)
        if first == second:
            if left * right != side:
                self.on_both_sides.append(first)
                self.restrict(first, ROTATION, f"{why} reads it on both sides")
            return
        self._parent[second] = first, left * right * side
        limits = dict.fromkeys((*self.limits(first), *self.limits(second)))
        self._limits[first] = tuple(limits)[:_LIMITS]
        self._gauge[first] &= self._gauge[second]

    # -- the walk ------------------------------------------------------------------------------------------------------

    def _walk(self) -> None:
        for value in self.graph.inputs:
            self.fix(self._places(value), "it is an axis of a graph input")
        for parameter in self.graph.parameters.values():
            self._stored.add(parameter)
            if not is_real(parameter.dtype):
                self.fix(self._places(parameter), f"{parameter.name} holds whole numbers")
        for node in self.graph.nodes:
            self._visit(node)
            for region in node.regions:
                for inner in (inner for _, inner in region.walk()):
                    self._fix_values([v for _, v in inner.operands()], "it is read in a branch or a loop")
                self._fix_values(region.outputs, "it is read in a branch or a loop")
        self._fix_values(self.graph.outputs, "it is an axis of a graph output")
        for state in self.graph.states:
            self._fix_values((state.before, state.after), "it is an axis of a state")

    def _fix_values(self, values: Sequence[Operand], why: str) -> None:
        for value in values:
            if isinstance(value, Value):
                self.fix(self._places(value), why)

    def _places(self, value: Value) -> list[Place]:
        """The places of a value on tracked Dims, which are entered."""
        found: list[Place] = []
        for axis, extent in enumerate(self.analysis.of[value]):
            for number, dim in enumerate(leaves(extent)):
                if dim in self.tracked:
                    found.append((value, axis, number))
                    if found[-1] not in self._parent:
                        self._parent[found[-1]] = found[-1], 1
                        self._gauge[found[-1]] = ANY
        return found

    def _visit(self, node: Node) -> None:
        values = [value for _, value in node.operands()]
        if all(value in self._stored for value in values):
            self._stored.update(node.outputs)
        places = [place for value in (*values, *node.outputs) for place in self._places(value)]
        if not places:
            return
        own, copies = self._separate(node)
        local = None if node.regions or "fixed" in node.metadata else local_axes(node, own)
        if local is None:
            self.fix(places, f"{node.label} is not seen through")
            return
        meeting = _Meeting(node, local)
        entered: set[Place] = set()
        for slot, axis, number, copy in copies:
            value = node.inputs[slot]
            assert isinstance(value, Value)
            if (value, axis, number) in self._parent:
                entered.update(meeting.enter(copy, (value, axis, number), slot))
        for value, axes in zip(node.outputs, local.results, strict=True):
            for axis, extent in enumerate(axes):
                entered.update(self._enter_results(meeting, value, axis, leaves(extent)))
        self.fix([p for p in places if p not in entered], f"{node.label} lays it out anew")
        for at in dims_at(local.call, local.results).values():
            if at.dim in meeting.operands or at.dim in meeting.results:
                self._decide(meeting, at)
        if "fixed_constants" in node.metadata:
            stay = [v for v in values if isinstance(v, Parameter) and v.kind == "constant"]
            self.fix([p for v in stay for p in self._places(v)], node.metadata["fixed_constants"])

    def _separate(self, node: Node) -> tuple[dict[int, Axes], list[tuple[int, int, int, Dim]]]:
        """Extents of the operands with a Dim of its own at each place, and these: slot, axis, number, Dim."""
        own: dict[int, Axes] = {}
        copies: list[tuple[int, int, int, Dim]] = []
        for slot, value in node.operands():
            own[slot] = []
            for axis, extent in enumerate(self.analysis.of[value]):
                made: list[Dim] = []
                own[slot].append(_separated(resolve(extent), made))
                copies += [(slot, axis, number, dim) for number, dim in enumerate(made)]
        return own, copies

    def _enter_results(self, meeting: _Meeting, value: Value, axis: int, found: Sequence[Dim]) -> Iterator[Place]:
        wanted = leaves(self.analysis.of[value][axis])
        if [dim.size for dim in found] != [dim.size for dim in wanted]:
            meeting.unclear.update(found)
            return
        for number, dim in enumerate(found):
            if (value, axis, number) in self._parent:
                meeting.results.setdefault(dim, []).append((value, axis, number))
                yield value, axis, number

    # -- one Dim at one node -------------------------------------------------------------------------------------------

    def _decide(self, meeting: _Meeting, at: DimAt) -> None:
        node, dim = meeting.node, at.dim
        operands, results = meeting.operands.get(dim, []), meeting.results.get(dim, [])
        every = [place for _, place in operands] + results
        if dim.pins or dim in meeting.unclear:
            why = f"{node.label}: {dim.pins[0].reason}" if dim.pins else f"{node.label} lays it out anew"
            self.fix(every, why)
        elif node.op in GAINED_NORMS and (at.gauge & ~Gauge.PERMUTE) == Gauge.FIXED and results:
            self._norm(meeting, operands, results)
        elif symmetry_of(node) is Symmetry.AFFINE and at.gauge == DIAGONAL:
            self._affine(meeting, operands, results)
        elif symmetry_of(node) is Symmetry.PRODUCT and results and at.factors > 1:
            self._product(meeting, at, operands, results)
        elif at.gauge & ~Gauge.PERMUTE == Gauge.FIXED:
            self.fix(every, f"{node.label} lets no scale and no rotation through")
        elif "contract" in at.roles and not results:
            self._contraction(meeting, at, operands)
        else:
            self._together(every, at.gauge, node)

    def _together(self, places: Sequence[Place], gauge: Gauge, node: Node) -> None:
        moving = [place for place in places if is_real(place[0].dtype)]
        for place in moving[1:]:
            self.link(moving[0], place, 1, node.label)
        for place in moving[:1]:
            self.restrict(place, gauge, f"{node.label} lets only these through: {gauge_in_words(gauge)}")

    def _contraction(self, meeting: _Meeting, at: DimAt, operands: Sequence[tuple[int, Place]]) -> None:
        places = [place for _, place in operands]
        if len(places) == 2 and operands[0][0] != operands[1][0]:
            self.link(places[0], places[1], -1, meeting.node.label)
            self.restrict(places[0], at.gauge, f"{meeting.node.label} lets only {gauge_in_words(at.gauge)} through")
        else:
            self.fix(places, f"{meeting.node.label} contracts more than two of it")

    def _norm(self, meeting: _Meeting, operands: Sequence[tuple[int, Place]], results: Sequence[Place]) -> None:
        """A norm tells the indices of what it reads apart; its gain and shift write what it gives."""
        node = meeting.node
        parts = [place for slot, place in operands if slot > 0]
        self.fix([place for slot, place in operands if slot == 0], f"{node.label} normalises what it reads")
        if meeting.slot("weight") is None:
            self.fix([*parts, *results], f"{node.label} has no gain")
            return
        self._together([*results, *parts], DIAGONAL, node)

    def _affine(self, meeting: _Meeting, operands: Sequence[tuple[int, Place]], results: Sequence[Place]) -> None:
        """``weight * (x - mean) / sqrt(var + eps) + bias``: without a gain what is read and given are scaled alike."""
        node = meeting.node
        named = {node.operator.slots[slot]: place for slot, place in operands}
        gain, x = named.pop("weight", None), named.pop("x")
        if "var" in named:
            self.fix([named.pop("var")], f"{node.label} divides by it")
        if gain is None:
            self._together([x, *named.values(), *results], DIAGONAL, node)
            return
        self._together([x, *(named[n] for n in ("mean",) if n in named)], DIAGONAL, node)
        self._together([*results, *(named[n] for n in ("bias",) if n in named)], DIAGONAL, node)
        self._trios.append(Trio(x, gain, results[0], node))

    def _product(
        self, meeting: _Meeting, at: DimAt, operands: Sequence[tuple[int, Place]], results: Sequence[Place]
    ) -> None:
        node = meeting.node
        factors = [place for slot, place in operands if slot != at.bias]
        shift = [place for slot, place in operands if slot == at.bias]
        if len(factors) != 2 or "contract" in at.roles or (at.bias is not None and not shift):
            self.fix([*factors, *shift, *results], f"{node.label} multiplies it in ways that take no scale")
        elif node.op == "div":
            self.fix(factors[1:], f"{node.label} divides by it")
            self._together([factors[0], *results], at.gauge & DIAGONAL, node)
        else:
            self._together([*results, *shift], DIAGONAL, node)
            for place in factors:
                self.restrict(place, DIAGONAL, f"{node.label} multiplies each index by another number")
            self._trios.append(Trio(factors[0], factors[1], results[0], node))

    # -- products ------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Give gains to what they read and write; then link what is left by those that are fixed."""
        times = Counter(root for trio in self._trios for root in {self.find(p)[0] for p in trio[:3]})
        computed = {self.find(p)[0] for p in self._parent if self._keeps(p[0])}
        by_root: dict[Place, list[Signed]] = {}
        for place in self._parent:
            root, side = self.find(place)
            by_root.setdefault(root, []).append((place, side))
        open_trios = []
        for trio in self._trios:
            apart = len({self.find(place)[0] for place in trio[:3]}) == 3
            gain = next((p for p in (trio.b, trio.a) if apart and self._absorbs(p, times, computed)), None)
            if gain is None:
                open_trios.append(trio)
            else:
                root, side = self.find(gain)
                members = [(place, sign * side) for place, sign in by_root[root]]
                self.absorbers.append(Absorber(members, trio.a if gain == trio.b else trio.b, trio.result))
        while open_trios:
            left = [trio for trio in open_trios if not self._linked_by_fixed(trio)]
            if len(left) == len(open_trios):
                self.fix(left[0][:3], f"{left[0].node.label} multiplies two values that both may be scaled")
            open_trios = left

    def _keeps(self, value: Value) -> bool:
        """Whether a value cannot be a part of a gain: it is computed from inputs, or a table of the graph's making."""
        return value not in self._stored or (isinstance(value, Parameter) and value.kind == "constant")

    def _absorbs(self, place: Place, times: Counter[Place], computed: set[Place]) -> bool:
        root, _ = self.find(place)
        return root not in computed and times[root] == 1 and Gauge.SCALE in self._gauge[root]

    def _linked_by_fixed(self, trio: Trio) -> bool:
        a, b, result = trio[:3]
        fixed = [self._gauge[self.find(p)[0]] & ~Gauge.PERMUTE == Gauge.FIXED for p in (a, b, result)]
        if not any(fixed):
            return False
        if fixed[0]:
            self.link(b, result, 1, trio.node.label)
        elif fixed[1]:
            self.link(a, result, 1, trio.node.label)
        else:
            self.link(a, b, -1, trio.node.label)
        return True


class _Meeting:
    """The places that each Dim of a node's own extents stands for."""

    def __init__(self, node: Node, local: LocalAxes) -> None:
        self.node, self.local = node, local
        self.operands: dict[Dim, list[tuple[int, Place]]] = {}
        self.results: dict[Dim, list[Place]] = {}
        self.unclear: set[Dim] = set()

    def enter(self, copy: Dim, place: Place, slot: int) -> Iterator[Place]:
        """Note the place of an operand, unless the node cuts its Dim into others."""
        found = resolve(copy)
        if isinstance(found, Dim):
            self.operands.setdefault(found, []).append((slot, place))
            yield place
        else:
            self.unclear.update(leaves(found))

    def slot(self, name: str) -> Value | None:
        """The value in a slot that is given."""
        slots = self.node.operator.slots[: len(self.node.inputs)]
        value = self.node.inputs[slots.index(name)] if name in slots else None
        return value if isinstance(value, Value) else None


def _separated(extent: Extent, made: list[Dim]) -> Extent:
    """The same extent with a new Dim for every leaf, which ``made`` receives from left to right."""
    if isinstance(extent, Dim):
        made.append(Dim(extent.size))
        return made[-1]
    parts = extent.factors if isinstance(extent, Product) else extent.segments
    copies = [_separated(part, made) for part in parts]
    if not copies:
        return extent
    return Product(copies) if isinstance(extent, Product) else Concat(copies)
