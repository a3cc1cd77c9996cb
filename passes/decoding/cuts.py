"""Where a cache is cut: of all values that keys and values can be computed from, those that take least room.

Keys that four heads read in turn are kept once, in front of the repetition; keys that a layer makes of a smaller latent
are kept as the latent; what is stored in few bits is kept as codes and scales. What lies between is computed anew for
all positions at every step, so that a layer is only repeated where what it reads is a bottleneck: made by a layer from
something that is no smaller than what it gives.
"""

from __future__ import annotations

from math import prod

from regauge.ir.cost import item_size
from regauge.ir.graph import Node, Parameter, Value
from regauge.passes.decoding.positions import Positions, courses


def bytes_each(value: Value, positions: Positions) -> float:
    """What one position of one sequence takes of a value: axes of other dynamic sizes count as sequences."""
    counts = [size for size in value.shape if isinstance(size, int)]
    return prod(counts) * item_size(value.dtype)


class Cuts:
    """The cheapest values to keep, for every value that is asked for at all positions."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self._found: dict[Value, frozenset[Value]] = {}

    def of(self, value: Value) -> frozenset[Value]:
        """What to keep to compute all positions of ``value`` from; the value itself where nothing is smaller."""
        if value not in self._found:
            self._found[value] = frozenset({value})  # also ends cycles of questions
            self._found[value] = min(self._ways(value), key=self._price)
        return self._found[value]

    def _ways(self, value: Value) -> list[frozenset[Value]]:
        """To keep the value, and to keep what it is computed from; the first is taken where neither is smaller."""
        ways = [frozenset({value})]
        node = value.producer
        if node is not None and self._repeatable(node):
            before = [v for _, v in node.operands() if v in self.positions.streamed]
            ways.append(frozenset().union(*(self.of(v) for v in before)))
        return ways

    def _price(self, kept: frozenset[Value]) -> tuple[float, int]:
        """Bytes, and for the same the fewest axes of size 1."""
        return sum(bytes_each(value, self.positions) for value in kept), sum(value.shape.count(1) for value in kept)

    def _repeatable(self, node: Node) -> bool:
        """Whether a node treats each position by itself and is worth running for all of them."""
        found = courses(node, self.positions)
        timed = [v for _, v in node.operands() if v in self.positions.streamed]
        if found is None or found.ended or found.merged or found.mixing & set(found.kept.values()) or node.regions:
            return False
        if not all(len(self.positions.axes(v)) == 1 and self.positions.plain(v) for v in (*timed, *node.outputs)):
            return False
        return not is_layer(node) or self._reads_bottleneck(node)

    def _reads_bottleneck(self, node: Node) -> bool:
        """Whether the layer that made what this one reads, itself read something no smaller than this one's result."""
        given, made = node.inputs[0], bytes_each(node.outputs[0], self.positions)
        while isinstance(given, Value) and given.producer is not None and given in self.positions.streamed:
            before = given.producer
            timed = [v for _, v in before.operands() if v in self.positions.streamed]
            if len(timed) != 1:
                return False
            if is_layer(before):
                return bytes_each(timed[0], self.positions) >= made
            given = timed[0]
        return False


def is_layer(node: Node) -> bool:
    """Whether a node contracts what it reads with a weight."""
    return node.op in ("linear", "matmul", "conv") and len(node.inputs) > 1 and isinstance(node.inputs[1], Parameter)
