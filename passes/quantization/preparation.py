"""What is done to a graph before its weights are scaled, rotated or rounded: norms folded, linear layers assembled."""

from __future__ import annotations

from regauge.ir.graph import Graph
from regauge.passes.base import Context
from regauge.passes.simplify.simplify import Simplify


def prepared(graph: Graph) -> Graph:
    """The graph with norms folded into layers, and linear layers put together; the same function.

    Projections stay apart: joined ones would have axes, and ranges, in common.
    """
    for step in (Simplify(skip=("projections",)), Simplify(only=("assemble-linear", "dead-code"))):
        graph = step.call(graph, Context())
    return graph
