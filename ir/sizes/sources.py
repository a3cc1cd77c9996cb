"""Nodes that tell a dynamic size that follows from data, such as the number of hits of a ``nonzero``.

Such a size is read off a result where the graph runs, and may be all that anything wants of that result.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import sympy

from regauge.ir.graph import Graph, Node, Value
from regauge.ir.sizes.expressions import symbols_in


def untold_sources(graph: Graph, live: Collection[Node]) -> list[Node]:
    """Nodes not among the live ones that alone tell a size before a live one, or an output, first reads it."""
    dead = _told_by([node for node in graph.nodes if node not in live])
    for value in graph.inputs if dead else ():
        for size in value.shape:
            dead.pop(size, None)
    if not dead:
        return []
    running = [node for node in graph.nodes if node in live]
    told, place = _told_by(running), {node: index for index, node in enumerate(running)}
    found: dict[Node, None] = {}
    for size, index in _first_reads(graph, running).items():
        if size in dead and (size not in told or place[told[size]] > index):
            found[dead[size]] = None
    return list(found)


def _told_by(nodes: Sequence[Node]) -> dict[Any, Node]:
    """Sizes that results of these nodes have and none of their operands and attributes, with the first such node."""
    found: dict[Any, Node] = {}
    for node in nodes:
        sizes = {size for value in node.outputs for size in value.shape if isinstance(size, sympy.Symbol)}
        if not sizes:
            continue
        given = symbols_in([value.shape for _, value in node.operands()]) | set(_read_by(node))
        for size in sizes - given:
            found.setdefault(size, node)
    return found


def _first_reads(graph: Graph, nodes: Sequence[Node]) -> dict[sympy.Symbol, int]:
    """Sizes that must have a value where these nodes are computed, with the place of the first; outputs come last."""
    found: dict[sympy.Symbol, int] = {}
    for index, node in enumerate(nodes):
        for size in _read_by(node):
            found.setdefault(size, index)
    for size in symbols_in([output for output in graph.outputs if not isinstance(output, Value)]):
        found.setdefault(size, len(nodes))
    return found


def _read_by(node: Node) -> Iterator[sympy.Symbol]:
    yield from symbols_in([operand for operand in node.inputs if not isinstance(operand, Value)])
    yield from symbols_in(list(node.attributes.values()))
    for region in node.regions:
        yield from _first_reads(region, region.nodes)
