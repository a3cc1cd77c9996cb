"""Repeated blocks: structurally equal pieces of a network in a row, each from one value to another of the same shape.

    x0 -> [norm attention +] -> [norm mlp +] -> x1 -> [norm attention +] -> [norm mlp +] -> x2
          \\_______________ block _________/        \\_______________ block _________/

The trunk of a graph is what each of its inputs has to pass through: the chain of immediate post-dominators. Between two
neighbours of the trunk lies a link; links are named by their structure (operators, attributes, shapes of weights, how
they are wired), and a block is what repeats in the sequence of names. Residual branches that nothing repeats are blocks
of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx

from regauge.ir.graph import Node, Parameter, Value
from regauge.passes.depth.parts import Order, Part, alike, own_weights, trained

_LONGEST = 64  # links of a block; longer ones are not looked for
_SINK = "sink"


@dataclass(frozen=True)
class _Link:
    """What lies between two neighbours of the trunk."""

    source: Value
    result: Value
    nodes: tuple[Node, ...]
    structure: Any

    @property
    def is_layer(self) -> bool:
        return any(node.operator.macs is not None for node in self.nodes)


def repeated_blocks(order: Order, branches: Sequence[Part]) -> list[Part]:
    """The blocks of a graph in its order; ``branches`` are its residual branches."""
    found: list[Part] = []
    taken: set[Node] = set()
    for trunk in _trunks(order):
        for start, period, count in _repeats([link.structure for link in trunk], trunk):
            for place in range(start, start + period * count, period):
                part = _block(order, trunk[place : place + period])
                if part is not None and not taken & set(part.nodes):
                    found.append(part)
                    taken |= set(part.nodes)
    for part in _outermost(branches):
        if not taken & set(part.nodes):
            found.append(part)
    return sorted(found, key=lambda part: order.position[part.nodes[-1]])


def _block(order: Order, links: Sequence[_Link]) -> Part | None:
    source, result = links[0].source, links[-1].result
    nodes = order.needed_by([result], barrier=source)
    if not trained(nodes):
        return None
    return Part(source, result, tuple(nodes), order.names.of(own_weights(nodes), result.name))


def _outermost(branches: Sequence[Part]) -> list[Part]:
    """The branches that lie in no other one."""
    inside = {part.nodes[-1]: part for part in branches}
    nested = {part for outer in branches for node in outer.nodes[:-1] if (part := inside.get(node)) is not None}
    return [part for part in branches if part not in nested]


# -- the trunk ---------------------------------------------------------------------------------------------------------


def _trunks(order: Order) -> Iterator[list[_Link]]:
    """For each input of the graph, the links of what it passes through."""
    dominators = _post_dominators(order)
    for value in order.graph.inputs:
        chain = [value]
        node = _first(order, value, dominators)
        while isinstance(node, Node):
            if len(node.outputs) == 1:  # what is split and joined again, as by channel shuffles, is inside a link
                chain.append(node.output)
            node = dominators.get(node)
        yield [_link(order, before, after) for before, after in pairwise(chain)]


def _first(order: Order, value: Value, dominators: dict[Any, Any]) -> Any:
    """The node that all readers of an input lead to; its reader, where there is one."""
    paths: list[list[Node]] = []
    for reader in [node for node in value.consumers() if node in order.position]:
        path: list[Node] = []
        node: Any = reader
        while isinstance(node, Node):
            path.append(node)
            node = dominators.get(node)
        paths.append(path)
    shared = set(paths[0]).intersection(*paths[1:]) if paths else set()
    return next((node for node in paths[0] if node in shared), None) if paths else None


def _post_dominators(order: Order) -> dict[Any, Any]:
    """For every node the one that all that it computes goes through next; outputs that are read inside do not count."""
    graph: Any = nx.DiGraph()
    graph.add_node(_SINK)
    for node in order.nodes:
        users = [user for value in node.outputs for user, _ in value.uses]
        inside = [user for user in users if user in order.position]
        graph.add_edges_from((user, node) for user in inside)
        if not inside or len(inside) < len(users):
            graph.add_edge(_SINK, node)
    return dict(nx.immediate_dominators(graph, _SINK))


def _link(order: Order, before: Value, after: Value) -> _Link:
    nodes = order.needed_by([after], barrier=before)
    return _Link(before, after, tuple(nodes), structure_of(before, after, set(nodes)))


# -- structure ---------------------------------------------------------------------------------------------------------


def structure_of(source: Value, result: Value, nodes: set[Node]) -> tuple[Any, ...]:
    """What two pieces of a graph have in common when they are equal but for the contents of their weights.

    The nodes in the order in which a walk from the result over the operands meets them, each with its operator,
    attributes and operands: exact, since operands are ordered. Time: proportional to the nodes.
    """
    numbers: dict[Node, int] = {}
    found: list[Any] = []
    stack = [result.producer]
    while stack:
        node = stack.pop()
        if node is None or node in numbers or node not in nodes:
            continue
        numbers[node] = len(numbers)
        operands = list[Any]()
        for operand in node.inputs:
            if isinstance(operand, Value) and operand.producer in nodes and operand is not source:
                operands.append((operand.producer, operand.index))
            else:
                operands.append(_leaf(operand, source))
        attributes = tuple(sorted((name, repr(value)) for name, value in node.attributes.items()))
        found.append([node.op, attributes, len(node.regions), operands])
        stack += [value.producer for _, value in node.operands() if value is not source]
    return tuple((op, attributes, regions, _numbered(operands, numbers)) for op, attributes, regions, operands in found)


def _numbered(operands: Sequence[Any], numbers: dict[Node, int]) -> tuple[Any, ...]:
    return tuple((numbers[o[0]], o[1]) if isinstance(o[0], Node) else o for o in operands)


def _leaf(operand: Any, source: Value) -> tuple[Any, ...]:
    if operand is source:
        return ("source", source.signature)
    if isinstance(operand, Parameter):
        return (operand.kind, operand.signature)
    if isinstance(operand, Value):
        return ("side", operand.signature)
    return ("number", repr(operand))


# -- repeats -----------------------------------------------------------------------------------------------------------


def _repeats(names: Sequence[Any], trunk: Sequence[_Link]) -> list[tuple[int, int, int]]:
    """Where the sequence repeats itself: start, period and how often; short periods first, none inside another.

    Where a period may begin at several places, it begins with the most repeats, then with a link that has layers.
    """
    ids = {name: number for number, name in enumerate(dict.fromkeys(names))}
    sequence = [ids[name] for name in names]
    found: list[tuple[int, int, int]] = []
    free = [True] * len(sequence)
    for period in range(1, min(_LONGEST, len(sequence) // 2) + 1):
        start = 0
        while start + period < len(sequence):
            end = start
            while (
                end + period < len(sequence)
                and sequence[end] == sequence[end + period]
                and free[end]
                and free[end + period]
            ):
                end += 1
            if end - start >= period:
                best = _phase(trunk, start, end + period, period)
                if best is not None:
                    found.append(best)
                    free[start : end + period] = [False] * (end + period - start)
            start = end + 1
    return found


def _phase(trunk: Sequence[_Link], start: int, stop: int, period: int) -> tuple[int, int, int] | None:
    """Where in a run of repeats the blocks begin, and how many there are; None where none is a block."""
    options = []
    for first in range(start, min(start + period, stop - period + 1)):
        count = (stop - first) // period
        block = trunk[first : first + period]
        if alike(block[0].source, block[-1].result) and any(link.is_layer for link in block):
            options.append((-count, not block[0].is_layer, first))
    if not options:
        return None
    count, _, first = min(options)
    return (first, period, -count) if -count > 1 else None
