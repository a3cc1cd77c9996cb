"""The nodes of an ONNX graph in a given order."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir


def in_given_order(graph: onnx_ir.Graph, values: Sequence[onnx_ir.Value | None]) -> None:
    """Sort the nodes of a graph, in place, by the last of these values that each gives.

    Nodes that give none of them (constants, sizes) go before the first that reads them. The order of the values must be
    one in which they can be computed; whoever sorts topologically after this, stably, moves what is left.
    """
    place: dict[onnx_ir.Node, int] = {}
    for step, value in enumerate(values):
        producer = None if value is None else value.producer()
        if producer is not None:
            place[producer] = step
    nodes = list(graph)
    for node in reversed(nodes):
        if node not in place:
            readers = [place[user] for value in node.outputs for user, _ in value.uses() if user in place]
            place[node] = min(readers, default=len(values))
    graph.remove(nodes)
    graph.extend(sorted(nodes, key=place.__getitem__))
