"""Which nodes of a graph become one kernel, and what is refused.

Edges between nodes are tried once each, those that save most bytes first (what nothing else reads need not be written,
either): the regions at both ends become one where that is legal (:mod:`regauge.ir.fusion.legality`), where no path
leaves the union and comes back, and where a roofline of the device says that it gains, and what a kernel takes of it
(:mod:`regauge.ir.fusion.footprint`), where that is known. What is refused is kept with its reason and the bytes that it
goes on to move.
A softmax between two contractions becomes one region with both (attention), though with neither alone it could be one.
Then regions that have the same loops, but nothing between them, become one (horizontal fusion): rotary codes of queries
and keys, norms of several streams. A launch is saved, and what both read is read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from graphlib import TopologicalSorter
from itertools import pairwise
from itertools import product as product_of

from regauge.ir.cost import item_size, node_macs, smallest_sizes
from regauge.ir.errors import FusionError
from regauge.ir.fusion.footprint import Footprints
from regauge.ir.fusion.legality import NO_FLOAT, computed_in_windows, fault
from regauge.ir.fusion.plan_groups import Group, before_views, kept_apart, steps_of, trimmed, whole
from regauge.ir.fusion.planned import Plan as Plan
from regauge.ir.fusion.planned import Refusal as Refusal
from regauge.ir.fusion.planned import moves_nothing as moves_nothing
from regauge.ir.fusion.products import few_bit_sides
from regauge.ir.fusion.prologues import again
from regauge.ir.fusion.region import Region, is_view, no_element
from regauge.ir.fusion.tracing import trace
from regauge.ir.fusion.traffic import bytes_moved
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.roofline import DEVICES, Device
from regauge.ir.scalars import element_of
from regauge.ir.sizes.expressions import product

LIBRARY = "products are left to the runtime's library"
"""Why a product is no kernel where it is planned so."""

WINDOW = 16
"""Indices of a window, for each of which what stands before it is computed again: of more it is faster to move it."""

NEAR = 64
"""Nodes between regions that may become one without a value between them: what they read is kept until the last one."""

SHORTER = 0.9
"""What regions without a value between them may take as one, of the time that they take apart."""

FARTHEST = 512
"""Regions that are looked at to see whether a path leaves a region and comes back."""


def plan_fusion(
    graph: Graph,
    device: Device | None = None,
    at: Mapping[object, int] | None = None,
    *,
    contractions: bool = True,
    attention: bool = True,
    footprints: Footprints | None = None,
) -> Plan:
    """The plan for a device, by default a GPU; dynamic sizes are as ``at`` gives them, or the least they may be.

    Without ``contractions`` these are left to the library of the runtime, but for those with factors of few bits, and
    for attention, as long as that is wanted. ``footprints`` says what kernels take of the device: what would spill
    registers is refused; by default only the roofline counts.
    """
    device = DEVICES["gpu"] if device is None else device
    return _Planner(graph, device, at, contractions, attention, footprints).plan()


class _Planner:
    def __init__(
        self,
        graph: Graph,
        device: Device,
        at: Mapping[object, int] | None,
        contractions: bool,
        attention: bool,
        footprints: Footprints | None,
    ) -> None:
        self.graph, self.device, self.footprints = graph, device, footprints
        self.contractions, self.attention = contractions, attention
        self.bound = smallest_sizes(graph, at)
        self.place = {node: place for place, node in enumerate(graph.nodes)}
        # A node reads what its regions read of the graph around them, and what they return of it.
        self.owner = {inner: node for node in graph.nodes for part in node.regions for _, inner in part.walk()}
        self.returned: dict[Value, list[Node]] = {}
        for owner, part in [(None, graph), *((n, p) for n in graph.nodes for r in n.regions for p in r.nested())]:
            for value in [*part.outputs, *(state.after for state in part.states)]:
                if isinstance(value, Value):
                    self.returned.setdefault(value, []).extend([owner] if owner else [])
        self.known_bytes: dict[Value, float] = {}
        self.group = {node: self._alone(node) for node in graph.nodes}
        self.spans = list(range(len(graph.nodes)))  # for each place the last one of groups that begin up to there

    # -- costs -------------------------------------------------------------------------------------------------------

    def value_bytes(self, value: Value) -> float:
        if value not in self.known_bytes:
            sizes = [self.bound(size) for size in value.shape] if value.ranked else []
            self.known_bytes[value] = product(sizes) * item_size(value.dtype)
        return self.known_bytes[value]

    def _alone(self, node: Node) -> Group:
        place = self.place[node]
        group = Group([node], place, place)
        self._become_region(group)
        if group.region is None and not moves_nothing(node):
            read = dict.fromkeys(value for _, value in node.operands())
            self._cost(group, sum(map(self.value_bytes, [*read, *node.outputs])))
        return group

    def _become_region(self, group: Group) -> None:
        try:
            region = trace(trimmed(group.nodes), self.returned, group.beside)
        except FusionError as error:
            group.why = str(error)
            return
        if not region.nodes:
            group.region = region
            return
        group.why = self._left_to_library(region) or fault(region) or ""
        if not group.why:
            group.region = region
            self._cost(group, bytes_moved(region, self.value_bytes, self.bound))

    def _left_to_library(self, region: Region) -> str:
        if region.attention is not None:
            return "" if self.attention else "attention is left to the runtime's library"
        left = region.contractions and not self.contractions and not any(map(any, few_bit_sides(region)))
        return LIBRARY if left else ""

    def _cost(self, group: Group, moved: float) -> None:
        """A node by itself is computed as its runtime likes; a program of a kernel that reduces rows has whole rows."""
        macs = sum(node_macs(node, self.bound) for node in group.nodes)
        busy = 1.0
        if group.region is not None and len(group.region.nodes) > 1 and group.region.kind == "row reduction":
            rows = int(product(self.bound(dim.size) for dim in group.region.loops if dim not in group.region.reduced))
            busy = min(1.0, max(1, rows) / self.device.programs)
        launches, reached = (1, 1.0) if group.footprint is None else (group.footprint.launches, group.footprint.reached)
        group.bytes = moved
        transfer = moved / (self.device.bandwidth * min(busy, reached))
        group.seconds = launches * self.device.overhead + max(2 * macs / (self.device.flops * reached), transfer)

    def _takes_too_much(self, union: Group, most: float) -> str:
        """Why a kernel of a group would spill, or take more than so many seconds for what it takes of the device."""
        if self.footprints is None or union.region is None or len(union.region.nodes) < 2:
            return ""
        try:
            union.footprint = self.footprints(union.region, {d: int(self.bound(d.size)) for d in union.region.sized})
        except FusionError as error:
            return str(error)
        if union.footprint is None:
            return ""
        self._cost(union, union.bytes)
        return union.footprint.too_much() or (union.footprint.slow() if union.seconds > most else "")

    def readers(self, node: Node) -> list[Node]:
        """The nodes of the graph that read a result of a node, themselves or in their regions."""
        found = [
            self.owner.get(user, user)
            for value in node.outputs
            for user in [*value.consumers(), *self.returned.get(value, ())]
        ]
        return list(dict.fromkeys(found))

    def _saved(self, value: Value, above: Group, below: Group) -> float:
        """Bytes that need not be moved where a value stays inside of a kernel."""
        if not (above.bytes and below.bytes):
            return 0
        assert value.producer is not None
        inside = {*above.nodes, *below.nodes}
        stays = value not in self.returned and inside.issuperset(self.readers(value.producer))
        return self.value_bytes(value) * (2 if stays else 1)

    def _most_saved(self, value: Value, reader: Node) -> float:
        """Bytes that need not be moved where a value is computed and read in one kernel, whatever else is in it."""
        assert value.producer is not None
        stays = value not in self.returned and self.readers(value.producer) == [reader]
        return self.value_bytes(value) * (2 if stays else 1)

    # -- joining -----------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        before = sum(group.bytes for group in self.group.values())
        edges = [
            (value, node)
            for node in self.graph.nodes
            for value in dict.fromkeys(value for _, value in node.operands())
            if value.producer in self.place
        ]
        # What is made of codes goes first: whether a product is left to a library depends on it.
        edges.sort(key=lambda edge: (not edge[0].producer.operator.expands, -self._most_saved(*edge)))  # type: ignore[union-attr]
        refused = self._join_along(edges)
        if self.attention:
            made = self._join_attention()
            made |= self._join_latents()
            found = self._join_along([edge for edge in edges if not made.isdisjoint(self._ends(*edge))])
            refused = list({(refusal.value, refusal.reader): refusal for refusal in [*refused, *found]}.values())
        self._join_beside()
        groups = self._in_order()
        apart = [r for r in refused if self.group[r.value.producer] is not self.group[r.reader]]  # type: ignore[index]
        apart += self._apart_beside()
        apart.sort(key=lambda refusal: -refusal.bytes)
        steps = [step for group in groups for step in steps_of(group)]
        after = sum(group.bytes for group in groups)
        alone = sum(not moves_nothing(node) for node in self.graph.nodes)
        known = {group.region: group.footprint for group in groups if group.region is not None and group.footprint}
        return Plan(self.graph, tuple(steps), tuple(apart), int(after), int(before), alone, known)

    def _ends(self, value: Value, reader: Node) -> tuple[Group, Group]:
        assert value.producer is not None
        return self.group[value.producer], self.group[reader]

    def _join_along(self, edges: Iterable[tuple[Value, Node]]) -> list[Refusal]:
        """Make one group of those at both ends of each edge, where that gains."""
        refused: list[Refusal] = []
        for value, reader in edges:
            above, below = self._ends(value, reader)
            if above is not below:
                refused += self._joined(above, below, value, reader)
        return refused

    def _join_attention(self) -> set[Group]:
        """Make one group of each softmax and the two contractions that it stands between; the groups made."""
        made: set[Group] = set()
        for group in list(dict.fromkeys(self.group.values())):
            ops = {term.op for term in group.region.reductions} if group.region is not None else set()
            if not ops >= {"amax", "sum"} or group.region is None or group.region.kind != "row reduction":
                continue
            above = {self.group[v.producer] for n in group.nodes for _, v in n.operands() if v.producer in self.place}
            below = {self.group[reader] for node in group.nodes for reader in self.readers(node)}
            for first, last in product_of(above - {group}, below - {group}):
                union = self._between(first, group, last)
                if union is not None:
                    self._become_one(union)
                    made.add(union)
                    break
        return made

    def _between(self, first: Group, middle: Group, last: Group) -> Group | None:
        """Three groups as one that is attention; None where they are not that, or would not gain."""
        if first is last or not all(sum(node_macs(n, self.bound) for n in group.nodes) for group in (first, last)):
            return None
        nodes = self._without_views_first([*first.nodes, *middle.nodes, *last.nodes])
        return self._as_attention(nodes, first, middle, last)

    def _as_attention(self, nodes: list[Node], *parts: Group) -> Group | None:
        """Nodes as one group that is attention; None where they are not that, or would take longer than the parts."""
        union = Group(nodes, self.place[nodes[0]], self.place[nodes[-1]])
        if self._comes_back(union):
            return None
        self._become_region(union)
        if union.region is None or union.region.kind != "attention" or again(union.region, self.bound):
            return None
        apart = sum(part.seconds for part in parts)
        return None if union.seconds > apart or self._takes_too_much(union, apart) else union

    def _join_latents(self) -> set[Group]:
        """Let attention compute keys that are products with latents, and mix the latents of values; the groups made.
        Products are left to a library otherwise, and so are the views that stand between."""
        made: set[Group] = set()
        for group in list(dict.fromkeys(self.group.values())):
            if group.region is None or group.region.kind != "attention":
                continue
            for producer, views in before_views(group.nodes):
                below, above = self.group[group.nodes[0]], self.group.get(producer)
                if above is None or not node_macs(producer, self.bound):
                    continue
                nodes = sorted({*above.nodes, *views, *below.nodes}, key=self.place.__getitem__)
                union = self._as_attention(nodes, above, below)
                if union is not None and union.region.attention.of_latents:  # type: ignore[union-attr]
                    self._become_one(union)
                    made.discard(below)
                    made.add(union)
        return made

    def _joined(self, above: Group, below: Group, value: Value, reader: Node) -> Iterable[Refusal]:
        """Make one group of two; a refusal where they stay apart."""
        nodes = self._without_views_first(above.nodes + below.nodes)
        if len(nodes) <= max(len(above.nodes), len(below.nodes)):
            return []  # one of them is a view of what is outside
        union = Group(nodes, self.place[nodes[0]], self.place[nodes[-1]])
        saved = self._saved(value, above, below)
        reason = self._never(above) or self._never(below) or self._comes_back(union)
        if not reason:
            self._become_region(union)
            saved = above.bytes + below.bytes - union.bytes if union.region is not None else saved
            reason = union.why or self._no_gain(above, below, union)
        if reason:
            return [Refusal(reason, int(saved), value, reader)] if saved > 0 else []
        self._become_one(union)
        return []

    def _become_one(self, union: Group) -> None:
        for node in union.nodes:
            self.group[node] = union
        place = union.first
        while self.spans[place] < union.last:
            self.spans[place] = union.last
            place += 1

    def _join_beside(self) -> None:
        """Make one group of those that nothing connects but the loops that they have."""
        open_: dict[object, list[Group]] = {}
        for group in list(dict.fromkeys(self.group.values())):
            largest = whole(group)
            if largest is None:
                continue
            near = open_.setdefault(kept_apart(group.region, largest), [])  # type: ignore[arg-type]
            near[:] = [other for other in near if group.first - other.last <= NEAR]
            for place, other in enumerate(near):
                union = self._beside(other, group)
                if isinstance(union, Group):
                    self._become_one(union)
                    near[place] = union
                    break
            else:
                near.append(group)

    def _beside(self, first: Group, second: Group) -> Group | str:
        """Both as one group, or why they cannot be, or would not gain."""
        nodes = self._without_views_first(first.nodes + second.nodes)
        results = [*(first.beside or (whole(first),)), *(second.beside or (whole(second),))]
        beside = tuple(value for value in results if value is not None)
        union = Group(nodes, self.place[nodes[0]], self.place[nodes[-1]], beside)
        reason = "one reads the other" if self._connected(first, second) else self._comes_back(union)
        if reason:
            return reason
        self._become_region(union)
        if union.region is None:
            return union.why
        most = SHORTER * (first.seconds + second.seconds)
        if union.seconds >= most:
            return f"it would take more than {SHORTER:.0%} of the time"
        return self._takes_too_much(union, most) or union

    def _apart_beside(self) -> list[Refusal]:
        """What neighbours that read the same values, but not each other, go on to read twice."""
        found: dict[tuple[Group, Group], tuple[Value, Node, float]] = {}
        for value in [*self.graph.inputs, *(value for node in self.graph.nodes for value in node.outputs)]:
            readers = {self.group[user]: user for user in reversed(value.consumers()) if user in self.group}
            groups = sorted((group for group in readers if group.region and group.bytes), key=lambda group: group.first)
            for first, second in pairwise(groups):
                *_, known = found.get((first, second), (0.0,))
                found[first, second] = (value, readers[second], known + self.value_bytes(value))
        refusals = []
        for (first, second), (value, reader, saved) in found.items():
            reason = self._why_beside(first, second)
            if reason and saved:
                refusals.append(Refusal(f"with what else reads it: {reason}", int(saved), value, reader))
        return refusals

    def _why_beside(self, first: Group, second: Group) -> str:
        """Why regions are not one beside one another; nothing where a refusal says it that is between them."""
        if self._connected(first, second):
            return ""
        assert first.region is not None and second.region is not None
        kinds = {first.region.kind, second.region.kind}
        if kinds == {"contraction"}:
            return "it would have two contractions"
        one, other = whole(first), whole(second)
        if len(kinds) > 1 or one is None or other is None or one.shape != other.shape:
            return "they have other loops"
        if second.first - first.last > NEAR:
            return f"more than {NEAR} nodes lie between them"
        union = self._beside(first, second)
        return union if isinstance(union, str) else ""

    def _connected(self, first: Group, second: Group) -> bool:
        """Whether one reads the other: then that they are one was refused."""
        return any(
            not inside.isdisjoint(self.readers(node))
            for one, inside in ((first, set(second.nodes)), (second, set(first.nodes)))
            for node in one.nodes
        )

    def _without_views_first(self, nodes: list[Node]) -> list[Node]:
        """The nodes in order, without views of what is outside: others may read these before the kernel runs."""
        kept: dict[Node, None] = {}
        for node in sorted(nodes, key=self.place.__getitem__):
            if not is_view(node) or any(value.producer in kept for _, value in node.operands()):
                kept[node] = None
        return list(kept)

    def _never(self, group: Group) -> str:
        """Why a group can be in no region at all."""
        node = group.nodes[0]
        if len(group.nodes) > 1 or group.region is not None:
            return ""
        if element_of(node) is None:
            return no_element(node.operator)
        # With a weight of few bits it may be another matter, and with what reads a truth value.
        return "" if group.why == LIBRARY or group.why.endswith(NO_FLOAT) else group.why

    def _no_gain(self, above: Group, below: Group, union: Group) -> str:
        region = union.region
        assert region is not None
        if region.contractions and (reason := again(region, self.bound)):
            return reason
        if computed_in_windows(region) and int(product(self.bound(dim.size) for dim in region.reduced)) > WINDOW:
            return f"what stands before windows would be computed again for more than {WINDOW} indices"
        if not (above.bytes and below.bytes):  # a view goes along with what reads or writes it
            self._takes_too_much(union, math.inf)
            return ""
        apart = above.seconds + below.seconds
        if union.bytes < above.bytes + below.bytes and union.seconds <= apart:
            return self._takes_too_much(union, apart)
        return "it would take longer: rows are read again, or too few to keep the device busy"

    def _comes_back(self, union: Group) -> str:
        """Whether a path leaves the nodes and comes back: then they cannot run at once."""
        inside = set(union.nodes)
        last = union.last
        while self.spans[last] > last:  # what lies behind leads back only through a group that spans it
            last = self.spans[last]
        seen: set[Group] = set()
        stack = [user for node in union.nodes for user in self.readers(node) if user not in inside]
        while stack:
            group = self.group[stack.pop()]
            if group in seen or group.first > last:
                continue
            seen.add(group)
            if len(seen) > FARTHEST:
                return "too much lies between them to see whether a path leaves them and comes back"
            users = [user for node in group.nodes for user in self.readers(node)]
            if not inside.isdisjoint(users):
                return "a path leaves them and comes back"
            stack += users
        return ""

    def _in_order(self) -> list[Group]:
        """The groups in an order in which they can run."""
        order: TopologicalSorter[Group] = TopologicalSorter()
        for node in self.graph.nodes:
            order.add(self.group[node])
            for user in self.readers(node):
                if self.group[user] is not self.group[node]:
                    order.add(self.group[user], self.group[node])
        return list(order.static_order())
