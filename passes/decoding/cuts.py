"""Where a cache is cut: of all values that keys and values can be computed from, those that take least room.

Keys that four heads read in turn are kept once, in front of the repetition; keys that a layer makes of a smaller latent
are kept as the latent; what is stored in few bits is kept as codes and scales. What lies between is computed anew for
all positions at every step, so that a layer is only repeated where what it reads is a bottleneck: smaller than what it
gives, and made by a layer from something larger.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from math import prod
from typing import Any

import networkx as nx

from regauge.ir.cost import item_size
from regauge.ir.graph import Node, Value
from regauge.passes.decoding.cache_bytes import entries
from regauge.passes.decoding.positions import ATTENTIONS, Positions, courses

_START, _END = ("", "start"), ("", "end")
_FINER = 64  # parts of a bit that tell values of one size apart


def bytes_each(value: Value, positions: Positions) -> float:
    """What one position of one sequence takes of a value."""
    counts = [entries(size) for size in value.shape if size != positions.length]
    return prod(counts) * item_size(value.dtype)


class Cuts:
    """The cheapest values to keep, for every value that is asked for at all positions: minimum cuts of the graph.

    Values that can be computed from something in common have one cut together, so that what serves several of them is
    paid for once: a latent that two layers read may be larger than the keys of either. Those that attention, or a
    product of weights and values, sums over are known from the start; what is kept for them costs nothing for others.
    ``far`` takes of cuts of one price that farthest from what is asked for, in place of the nearest.
    """

    def __init__(self, positions: Positions, *, far: bool = False) -> None:
        self.positions, self.far = positions, far
        self._asked = dict.fromkeys(_asked_for(positions))
        self._found: dict[Value, frozenset[Value]] = {}
        self._kept: set[Value] = set()
        self._repeats: dict[Node, bool] = {}
        self._alone: dict[Node, bool] = {}
        self._open: dict[Value, bool] = {}
        for node in positions.nodes:  # in this order, so that each finds what it needs to know of others
            if self._is_layer(node):
                self._repeatable(node)

    def of(self, value: Value) -> frozenset[Value]:
        """What to keep to compute all positions of ``value`` from; of cuts of one price the nearest to it."""
        if value not in self._found:
            asked = self._asked if value in self._asked else {value: None}
            for together in self._together(list(asked)):
                self._cut(together)
        return self._found[value]

    def _together(self, asked: Sequence[Value]) -> Iterator[list[Value]]:
        """Those that are computed from something in common, with one another or by way of others."""
        common: nx.Graph[Value] = nx.Graph()
        for value in asked:
            common.add_node(value)
            nx.add_path(common, [value, *(own for own, _ in self._sources(value))])
        wanted = set(asked)
        for component in nx.connected_components(common):
            yield [value for value in component if value in wanted]

    def _cut(self, asked: Sequence[Value]) -> None:
        network: nx.DiGraph[Any] = nx.DiGraph()
        for value in asked:
            network.add_edge((value, "made"), _END)
            for own, given in self._sources(value):
                network.add_edge((own, "read"), (own, "made"), capacity=self._price(own))
                for before in given or ():
                    network.add_edge((before, "made"), (own, "read"))
                if given is None:
                    network.add_edge(_START, (own, "read"))
        if self.far:  # seen from the other end
            _, (_, outside) = nx.minimum_cut(network.reverse(copy=False), _END, _START)
            kept = {v for v, side in outside - {_START} if side == "read"} - {
                v for v, side in outside if side == "made"
            }
        else:
            _, (_, near) = nx.minimum_cut(network, _START, _END)
            kept = {v for v, side in near - {_END} if side == "made"} - {v for v, side in near if side == "read"}
        for value in asked:
            self._found[value] = frozenset(own for own, _ in self._sources(value, kept) if own in kept)
        self._kept |= kept

    def _sources(self, value: Value, kept: Collection[Value] = ()) -> Iterator[tuple[Value, list[Value] | None]]:
        """What a value can be computed from, nearest first, each with what it is computed from itself.

        None stands for what cannot be computed anew for all positions; it ends there, and at what is ``kept``.
        """
        waiting, seen = [value], {value}
        while waiting:
            own = waiting.pop()
            node = own.producer
            given = None if node is None or not self._repeatable(node) else self._streamed(node)
            yield own, given
            for before in given or () if own not in kept else ():
                if before not in seen:
                    seen.add(before)
                    waiting.append(before)

    def _price(self, value: Value) -> int:
        """Bits, and of values that take the same that with the fewest axes of size 1."""
        if value in self._kept:
            return 0
        return round(8 * bytes_each(value, self.positions)) * _FINER + value.shape.count(1)

    def _streamed(self, node: Node) -> list[Value]:
        return [value for _, value in node.operands() if value in self.positions.streamed]

    def _repeatable(self, node: Node) -> bool:
        """Whether a node treats each position by itself and is worth running for all of them."""
        if node not in self._repeats:
            self._repeats[node] = self._by_position(node) and (not self._is_layer(node) or self._reads_bottleneck(node))
        return self._repeats[node]

    def _by_position(self, node: Node) -> bool:
        if node not in self._alone:
            self._alone[node] = self._treats_alone(node)
        return self._alone[node]

    def _treats_alone(self, node: Node) -> bool:
        found = courses(node, self.positions)
        if found is None or found.ended or found.merged or found.mixing & set(found.kept.values()) or node.regions:
            return False
        values = (*self._streamed(node), *node.outputs)
        return all(len(self.positions.axes(v)) == 1 and self.positions.plain(v) for v in values)

    def _reads_bottleneck(self, node: Node) -> bool:
        """Whether what this layer reads is computed from less than the layers that it comes from read.

        Each value that it is computed from has to be smaller than what any layer behind it reads, and all of them
        together smaller than what these layers read. What is kept, or asked for, is there for all positions anyway.
        """
        if any(map(self._is_open, self._streamed(node))):
            return False
        network: nx.DiGraph[Any] = nx.DiGraph()
        waiting = self._streamed(node)
        seen = set(waiting)
        network.add_edges_from(((value, "made"), _END) for value in waiting)
        while waiting:
            own = waiting.pop()
            free = self._is_there(own)
            network.add_edge((own, "read"), (own, "made"), capacity=0 if free else self._price(own))
            before = own.producer
            if free or before is None:
                continue
            given = self._streamed(before)
            if self._ends_at(before):
                network.add_edge(_START, (given[0], "input"), capacity=self._price(given[0]))
                network.add_edge((given[0], "input"), (own, "read"))
                continue
            for value in given:
                network.add_edge((value, "made"), (own, "read"))
            waiting += [value for value in given if value not in seen]
            seen.update(given)
        if not network.has_node(_START):
            return True
        _, (behind, _) = nx.minimum_cut(network.reverse(copy=False), _END, _START)  # of cuts that nearest to the start
        for before, after in network.edges:
            if before in behind or after not in behind:
                continue
            if before == _START:
                return False
            inputs = [own for own, kind in nx.ancestors(network, before) - {_START} if kind == "input"]
            if any(self._price(own) <= network.edges[before, after]["capacity"] for own in inputs):
                return False
        return True

    def _is_there(self, value: Value) -> bool:
        return value in self._kept or value in self._asked

    def _ends_at(self, node: Node) -> bool:
        """Whether a node is a layer that is not worth repeating."""
        return self._is_layer(node) and not self._repeatable(node)

    def _is_open(self, value: Value) -> bool:
        """Whether a value comes, by no such layer, from an input or from what mixes positions."""
        waiting = [value]
        while waiting:
            own = waiting[-1]
            node = own.producer
            if own in self._open or self._is_there(own):
                self._open.setdefault(own, False)
            elif node is None or not self._by_position(node):
                self._open[own] = True
            elif self._ends_at(node):
                self._open[own] = False
            else:
                given = self._streamed(node)
                unknown = [before for before in given if before not in self._open]
                if unknown and not any(self._open.get(before) for before in given):
                    waiting += unknown
                    continue
                self._open[own] = any(self._open.get(before, False) for before in given)
            waiting.pop()
        return self._open[value]

    def _is_layer(self, node: Node) -> bool:
        """Whether a node contracts what is computed from inputs with a weight, or with what is made of one."""
        return node.op in ("linear", "matmul", "conv") and len(self._streamed(node)) == 1


def _asked_for(positions: Positions) -> Iterator[Value]:
    """The keys and values of attentions, and what products sum over positions of."""
    for node in positions.nodes:
        if node.op in ATTENTIONS:
            ended = [slot for slot, _ in node.operands() if slot in (1, 2)]
        elif any(len(positions.axes(value)) > 1 for _, value in node.operands()):
            found = courses(node, positions)
            ended = [] if found is None else [slot for slot, _ in found.ended]
        else:
            continue
        for slot in ended:
            value = node.inputs[slot]
            if isinstance(value, Value) and value in positions.streamed and len(positions.axes(value)) == 1:
                yield value
