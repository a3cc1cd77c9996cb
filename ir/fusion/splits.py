"""Splits as slices: a kernel computes what has one result, and reads each piece where it lies."""

from __future__ import annotations

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.scalars import element_of
from regauge.ir.sizes.expressions import is_static


def slice_splits(graph: Graph) -> int:
    """Put slices in the place of splits whose pieces are computed with, as halves of rotary codes are; returns how many
    splits there were. Pieces of dynamic sizes stay."""
    found = [node for node in graph.nodes if node.op == "split" and _is_computed_with(node)]
    for node in found:
        _slice(graph, node)
    return len(found)


def _is_computed_with(node: Node) -> bool:
    read = {user.op for value in node.outputs for user, _ in value.uses if element_of(user) is not None}
    return all(map(is_static, node.attributes["sizes"])) and bool(read)


def _slice(graph: Graph, node: Node) -> None:
    x, dim = node.inputs[0], node.attributes["dim"]
    build = Builder(graph)
    start = 0
    kept = {value for part in graph.nested() for value in [*part.outputs, *(state.after for state in part.states)]}
    for value, size in zip(node.outputs, node.attributes["sizes"], strict=True):
        end = start + size
        start, begin = end, start
        if not value.uses and value not in kept:
            continue
        with build.at(node):
            piece: Value = build.slice(x, dim=dim, start=begin, end=end, step=1)
        replace_uses(graph, value, piece)
        for part in graph.nested():
            part.outputs = [piece if output is value else output for output in part.outputs]
        piece.origin = value.origin
        build.release([piece.name, value.name])
        piece.name, value.name = value.name, piece.name
    remove_node(graph, node)
