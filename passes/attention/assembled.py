"""Prepares a graph before its attention sites are looked for."""

from __future__ import annotations

from regauge.ir.graph import Graph
from regauge.passes.base import Context
from regauge.passes.simplify.simplify import Simplify


def assembled(graph: Graph) -> Graph:
    """The graph with attention and linear layers put together, in ONNX files of old opsets too; the same function.

    Projections stay apart: joined ones have axes in common, which could not be turned or cut by themselves any more.
    """
    assembles = Simplify(only=("assemble-linear", "assemble-attention", "dead-code"))
    for step in (Simplify(skip=("projections",)), assembles):
        graph = step.call(graph, Context())
    return graph
