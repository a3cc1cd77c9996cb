"""Parts of a graph that can be skipped: what lies between two values of the same shape and type.

    x -> part -> y        skipped:  whoever read y reads x

What only the part's result needs goes with it; what others read as well (attention masks, rotary tables, a norm that
two branches share) stays.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.sizes.expressions import same
from regauge.passes.depth.names import ModuleNames

Unit: TypeAlias = Literal["block", "branch"]


@dataclass(frozen=True, eq=False)
class Part:
    """Nodes between ``source`` and ``result`` that only ``result`` needs, in topological order."""

    source: Value
    result: Value
    nodes: tuple[Node, ...]
    name: str = ""

    @property
    def weights(self) -> list[Parameter]:
        """Trained parameters that only this part reads."""
        return own_weights(self.nodes)


class Order:
    """The nodes of a graph with their positions, and which values leave it."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        self.position = {node: place for place, node in enumerate(self.nodes)}
        self.held = {output for output in graph.outputs if isinstance(output, Value)}
        self.held |= {value for state in graph.states for value in (state.before, state.after)}
        self.names = ModuleNames(graph)

    def needed_by(self, results: Iterable[Value], barrier: Value | None = None) -> list[Node]:
        """Nodes that nothing but these results needs; ``barrier`` is taken as given. In topological order.

        Time: proportional to what is found, times its logarithm.
        """
        ends = {result for result in results}
        found: set[Node] = set()
        heap: list[int] = []
        seen: set[Node] = set()

        def visit(value: Value) -> None:
            node = value.producer
            if node is not None and value is not barrier and node not in seen and node in self.position:
                seen.add(node)
                heapq.heappush(heap, -self.position[node])

        for result in ends:
            visit(result)
        while heap:
            node = self.nodes[-heapq.heappop(heap)]
            if any(not self._is_own(value, ends, found) for value in node.outputs):
                continue
            found.add(node)
            for _, value in node.operands():
                visit(value)
        return sorted(found, key=self.position.__getitem__)

    def _is_own(self, value: Value, ends: set[Value], found: set[Node]) -> bool:
        """Whether a result of a node is one of the ends, or read by nothing but what was found."""
        return value in ends or (value not in self.held and all(user in found for user, _ in value.uses))

    def depends(self, values: Iterable[Value], on: Value, stop: Callable[[Node], bool] = lambda _: False) -> bool:
        """Whether one of the values is computed from another one, not by way of a node where ``stop`` is true."""
        first = self.position[on.producer] if on.producer is not None else -1
        stack, seen = list(values), set[Node]()
        while stack:
            value = stack.pop()
            if value is on:
                return True
            node = value.producer
            if node is not None and node not in seen and self.position.get(node, -1) > first and not stop(node):
                seen.add(node)
                stack += [operand for _, operand in node.operands()]
        return False


def alike(a: Value, b: Value) -> bool:
    """Whether one value can stand for another: same type and, for sure, same shape."""
    if a.dtype != b.dtype or not (a.ranked and b.ranked) or a.rank != b.rank:
        return False
    return all(same(m, n) for m, n in zip(a.shape, b.shape, strict=True))


def own_weights(nodes: Sequence[Node]) -> list[Parameter]:
    """Trained parameters that nothing but these nodes reads."""
    inside = set(nodes)
    return [weight for weight in trained(nodes) if all(user in inside for user, _ in weight.uses)]


def trained(nodes: Sequence[Node]) -> list[Parameter]:
    """Trained parameters that these nodes read; layers that share their weights are parts like any others."""
    read = dict.fromkeys(value for node in nodes for _, value in node.operands() if isinstance(value, Parameter))
    return [parameter for parameter in read if parameter.kind == "parameter"]


def read_outside(nodes: Sequence[Node]) -> list[Value]:
    """Values that the nodes read and do not compute, parameters not counted."""
    inside = set(nodes)
    read = dict.fromkeys(value for node in nodes for _, value in node.operands())
    return [value for value in read if value.producer not in inside and not isinstance(value, Parameter)]
