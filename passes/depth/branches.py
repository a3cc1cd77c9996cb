"""Residual branches: what is computed from a value and added to it.

y = x + f(x)              f goes: y becomes x
y = x + f(x) + g(x)       f or g goes, or both
y = s(x) + f(x)           with no weights in s (a shortcut that skips pixels, a scaled stream): y becomes s(x)
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from regauge.ir.graph import Node, Parameter, Value
from regauge.passes.depth.parts import Order, Part, alike, own_weights, read_outside, trained

PROJECTED = "sum of two branches that both have weights (a projecting shortcut)"
OTHER_SHAPE = "residual branch of another shape than its shortcut"


def residual_branches(order: Order, left: Counter[str]) -> list[Part]:
    """Every branch that a sum would do without, in the order of the graph; ``left`` counts sums that have none."""
    found = _Branches(order)
    for node in reversed(order.nodes):
        found.look_at(node)
    left.update(found.left)
    return sorted(found.parts, key=lambda part: order.position[part.nodes[-1]])


class _Branch(NamedTuple):
    value: Value
    nodes: list[Node]
    other: Value  # the other addend


class _Branches:
    def __init__(self, order: Order) -> None:
        self.order = order
        self.parts: list[Part] = []
        self.left: Counter[str] = Counter()
        self._inner: set[Node] = set()  # sums inside a branch, with that branch
        self._addends: dict[Node, list[_Branch]] = {}
        self._starts: dict[Value, Value | None] = {}

    def look_at(self, node: Node) -> None:
        if not is_sum(node) or node in self._inner:
            return
        branches = self._weighted(node)
        for branch in branches:
            shortcut = self._shortcut(branch.other)
            if shortcut is None or not self._reads(branch, shortcut):
                continue
            if not alike(branch.other, node.output):
                self.left[OTHER_SHAPE] += 1
                return
            self._add(node, branch)
            self._take_apart(branch, shortcut)
            return
        if len(branches) == 2 and all(any(n.operator.macs is not None for n in b.nodes) for b in branches):
            self.left[PROJECTED] += 1

    def _add(self, node: Node, branch: _Branch) -> None:
        name = self.order.names.of(own_weights(branch.nodes), node.name)
        self.parts.append(Part(branch.other, node.output, (*branch.nodes, node), name))

    def _take_apart(self, branch: _Branch, shortcut: Value) -> None:
        """A branch that is a sum of branches itself: each of them may go alone."""
        node = branch.value.producer
        while node is not None and node.op == "dropout":
            node = node.inputs[0].producer if isinstance(node.inputs[0], Value) else None
        if node is None or not is_sum(node) or node not in branch.nodes:
            return
        inner = [one for one in self._weighted(node) if self._reads(one, shortcut) and alike(one.other, node.output)]
        if len(inner) == 2:
            self._inner.add(node)
            for one in inner:
                self._add(node, one)
                self._take_apart(one, shortcut)

    def _weighted(self, node: Node) -> list[_Branch]:
        """The addends of a sum that only it reads, and that have weights; the later one first."""
        if node not in self._addends:
            self._addends[node] = self._find_weighted(node)
        return self._addends[node]

    def _find_weighted(self, node: Node) -> list[_Branch]:
        found = []
        for value, other in (node.inputs, node.inputs[::-1]):
            assert isinstance(value, Value) and isinstance(other, Value)
            if len(value.uses) != 1 or value in self.order.held or value.producer is None:
                continue
            nodes = self.order.needed_by([value])
            if trained(nodes):
                found.append(_Branch(value, nodes, other))
        return sorted(found, key=lambda branch: -self.order.position[branch.nodes[-1]])

    def _reads(self, branch: _Branch, shortcut: Value) -> bool:
        inside = set(branch.nodes)
        return self.order.depends([branch.value], shortcut, stop=lambda node: is_sum(node) and node not in inside)

    def _shortcut(self, value: Value) -> Value | None:
        """Where a shortcut without weights starts: the value itself, or what it is computed from.

        Of a sum that is only an addend itself it is the shortcut of that sum.
        """
        if value not in self._starts:
            self._starts[value] = self._find_shortcut(value)
        return self._starts[value]

    def _find_shortcut(self, value: Value) -> Value | None:
        nodes = self.order.needed_by([value]) if len(value.uses) == 1 and value not in self.order.held else []
        if not trained(nodes):
            outside = read_outside(nodes) if nodes else [value]
            return outside[0] if len(outside) == 1 else None
        node = value.producer
        if node is None or not is_sum(node):
            return None
        for branch in self._weighted(node):
            found = self._shortcut(branch.other)
            if found is not None and self._reads(branch, found):
                return found
        return None


def is_sum(node: Node) -> bool:
    """Whether a node adds two values that are computed, both with axes."""
    if node.op != "add" or len(node.inputs) != 2 or node.inputs[0] is node.inputs[1]:
        return False
    return all(isinstance(v, Value) and not isinstance(v, Parameter) and v.rank for v in node.inputs)
