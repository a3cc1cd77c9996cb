"""What is done to a graph before its sites of attention are looked for."""

from __future__ import annotations

from regauge.ir.graph import Graph
from regauge.passes.base import Context
from regauge.passes.simplify.simplify import Simplify


def assembled(graph: Graph) -> Graph:
    """The graph with attention and linear layers put together, in ONNX files of old opsets too; the same function."""
    for step in (Simplify(), Simplify(only=("assemble-linear", "assemble-attention", "dead-code"))):
        graph = step.call(graph, Context())
    return graph
