"""Nodes whose results nobody reads."""

from __future__ import annotations

from regauge.ir.edit import remove_dead
from regauge.ir.graph import Graph


def remove_dead_code(graph: Graph) -> int:
    """Remove what no output and no state depends on, in the graph and its regions; returns how many nodes."""
    count = remove_dead(graph)
    return count + sum(remove_dead_code(region) for node in graph.nodes for region in node.regions)
