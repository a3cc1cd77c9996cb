"""Where a cache is cut: of all values that keys and values can be computed from, those that take least room.

Keys that four heads read in turn are kept once, in front of the repetition; keys that a layer makes of a smaller latent
are kept as the latent; what is stored in few bits is kept as codes and scales. What lies between is computed anew for
all positions at every step, so that a layer is only repeated where what it reads is a bottleneck: smaller than what it
gives, and made by a layer from something larger.
"""

from __future__ import annotations

from math import inf, prod
from typing import Any

import networkx as nx

from regauge.ir.cost import item_size
from regauge.ir.graph import Node, Value
from regauge.passes.decoding.cache_bytes import entries
from regauge.passes.decoding.positions import Positions, courses

_START = ("", "")
_FINER = 64  # parts of a bit that tell values of one size apart


def bytes_each(value: Value, positions: Positions) -> float:
    """What one position of one sequence takes of a value."""
    counts = [entries(size) for size in value.shape if size != positions.length]
    return prod(counts) * item_size(value.dtype)


class Cuts:
    """The cheapest values to keep, for every value that is asked for at all positions: minimum cuts of the graph.

    What is kept for a value that was asked for before costs nothing. ``far`` takes of cuts of one price that farthest
    from what is asked for, in place of the nearest.
    """

    def __init__(self, positions: Positions, *, far: bool = False) -> None:
        self.positions, self.far = positions, far
        self._found: dict[Value, frozenset[Value]] = {}
        self._kept: set[Value] = set()
        self._repeats: dict[Node, bool] = {}

    def of(self, value: Value) -> frozenset[Value]:
        """What to keep to compute all positions of ``value`` from; of cuts of one price the nearest to it."""
        if value not in self._found:
            network = self._network(value)
            if self.far:  # seen from the other end
                _, (_, outside) = nx.minimum_cut(network.reverse(copy=False), (value, "made"), _START)
                kept = {v for v, side in outside if side == "read"} - {v for v, side in outside if side == "made"}
            else:
                _, (_, near) = nx.minimum_cut(network, _START, (value, "made"))
                kept = {v for v, side in near if side == "made"} - {v for v, side in near if side == "read"}
            self._found[value] = frozenset(kept)
            self._kept |= kept
        return self._found[value]

    def _network(self, value: Value) -> nx.DiGraph[Any]:
        """From what has to be kept where it is reached to the value; to keep a value on the way has its price."""
        network: nx.DiGraph[Any] = nx.DiGraph()
        waiting, seen = [value], {value}
        while waiting:
            own = waiting.pop()
            network.add_edge((own, "read"), (own, "made"), capacity=self._price(own))
            node = own.producer
            if node is None or not self._repeatable(node):
                network.add_edge(_START, (own, "read"))
                continue
            for given in self._streamed(node):
                network.add_edge((given, "made"), (own, "read"))
                if given not in seen:
                    seen.add(given)
                    waiting.append(given)
        return network

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
        found = courses(node, self.positions)
        if found is None or found.ended or found.merged or found.mixing & set(found.kept.values()) or node.regions:
            return False
        values = (*self._streamed(node), *node.outputs)
        return all(len(self.positions.axes(v)) == 1 and self.positions.plain(v) for v in values)

    def _reads_bottleneck(self, node: Node) -> bool:
        """Whether what this layer reads is computed from less than any layer that it comes from reads."""
        network: nx.DiGraph[Any] = nx.DiGraph()
        end, waiting, least = (node.output, "read"), self._streamed(node), inf
        for value in waiting:
            network.add_edge((value, "made"), end)
        seen = set(waiting)
        while waiting:
            own = waiting.pop()
            network.add_edge((own, "read"), (own, "made"), capacity=self._price(own))
            before = own.producer
            if own in self._kept:
                continue
            if before is None or not self._by_position(before):
                return False
            given = self._streamed(before)
            if self._is_layer(before) and not self._repeats.get(before):
                least = min(least, self._price(given[0]))
                network.add_edge(_START, (own, "read"))
                continue
            for value in given:
                network.add_edge((value, "made"), (own, "read"))
            waiting += [value for value in given if value not in seen]
            seen.update(given)
        return not network.has_node(_START) or nx.minimum_cut_value(network, _START, end) < least

    def _is_layer(self, node: Node) -> bool:
        """Whether a node contracts what is computed from inputs with a weight, or with what is made of one."""
        return node.op in ("linear", "matmul", "conv") and len(self._streamed(node)) == 1
