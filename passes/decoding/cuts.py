"""Where a cache is cut: of all values that keys and values can be computed from, those that take least room.

Keys that four heads read in turn are kept once, in front of the repetition; keys that a layer makes of a smaller latent
are kept as the latent; what is stored in few bits is kept as codes and scales. What lies between is computed anew for
all positions at every step, so that a layer is only repeated where what it reads is a bottleneck: smaller than what it
gives, and made by a layer from something larger.
"""

from __future__ import annotations

from math import prod
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
    """The cheapest values to keep, for every value that is asked for at all positions: minimum cuts of the graph."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self._found: dict[Value, frozenset[Value]] = {}

    def of(self, value: Value) -> frozenset[Value]:
        """What to keep to compute all positions of ``value`` from; of cuts of one price the nearest to it."""
        if value not in self._found:
            _, (_, near) = nx.minimum_cut(self._network(value), _START, (value, "made"))
            inside = {v for v, side in near if side == "made"} - {v for v, side in near if side == "read"}
            self._found[value] = frozenset(inside)
        return self._found[value]

    def _network(self, value: Value) -> nx.DiGraph[Any]:
        """From what has to be kept where it is reached to the value; to keep a value on the way has its price."""
        network: nx.DiGraph[Any] = nx.DiGraph()
        waiting, seen = [value], {value}
        while waiting:
            own = waiting.pop()
            network.add_edge((own, "read"), (own, "made"), capacity=self._price(own))
            node = own.producer
            before = [v for _, v in node.operands() if v in self.positions.streamed] if node is not None else []
            if node is None or not self._repeatable(node):
                network.add_edge(_START, (own, "read"))
                continue
            for given in before:
                network.add_edge((given, "made"), (own, "read"))
                if given not in seen:
                    seen.add(given)
                    waiting.append(given)
        return network

    def _price(self, value: Value) -> int:
        """Bits, and of values that take the same that with the fewest axes of size 1."""
        return round(8 * bytes_each(value, self.positions)) * _FINER + value.shape.count(1)

    def _repeatable(self, node: Node) -> bool:
        """Whether a node treats each position by itself and is worth running for all of them."""
        found = courses(node, self.positions)
        timed = [v for _, v in node.operands() if v in self.positions.streamed]
        if found is None or found.ended or found.merged or found.mixing & set(found.kept.values()) or node.regions:
            return False
        if not all(len(self.positions.axes(v)) == 1 and self.positions.plain(v) for v in (*timed, *node.outputs)):
            return False
        return not self._is_layer(node) or self._reads_bottleneck(node)

    def _reads_bottleneck(self, node: Node) -> bool:
        """Whether all that this layer reads comes from layers that read something larger than it does."""
        waiting = [value for _, value in node.operands() if value in self.positions.streamed]
        least, seen = sum(bytes_each(value, self.positions) for value in waiting), set(waiting)
        while waiting:
            before = waiting.pop().producer
            if before is None:
                return False
            given = [value for _, value in before.operands() if value in self.positions.streamed]
            if self._is_layer(before):
                if bytes_each(given[0], self.positions) <= least:
                    return False
                continue
            new = [value for value in given if value not in seen]
            seen.update(new)
            waiting += new
        return True

    def _is_layer(self, node: Node) -> bool:
        """Whether a node contracts what is computed from inputs with a weight, or with what is made of one."""
        timed = [value for _, value in node.operands() if value in self.positions.streamed]
        return node.op in ("linear", "matmul", "conv") and len(timed) == 1
