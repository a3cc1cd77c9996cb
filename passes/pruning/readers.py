"""Finds nodes that sum over Dims that are cut, so that they read less than before, and those that were not refitted."""

from __future__ import annotations

from collections.abc import Collection

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.kept import Keep
from regauge.ir.graph import Graph, Node

_ROLES = ("contract", "reduce")


def readers(graph: Graph, keep: Keep) -> dict[Node, list[Dim]]:
    """The nodes that contract or reduce Dims that are cut, in the order of the graph, with these."""
    found: dict[Node, dict[Dim, None]] = {}
    for node, role, dims in graph.axes.ends:
        cut = dict.fromkeys(dim for dim in dims if dim in keep)
        if role in _ROLES and cut:
            found.setdefault(node, {}).update(cut)
    return {node: list(found[node]) for _, node in graph.walk() if node in found}


def lost_in(graph: Graph, keep: Keep, repaired: Collection[Node]) -> dict[Dim, tuple[str, ...]]:
    """For each Dim that is cut why what reads it does not make up for that: a node that is none of the ``repaired``."""
    found: dict[Dim, dict[str, None]] = {}
    for node, dims in readers(graph, keep).items():
        if node not in repaired:
            for dim in dims:
                found.setdefault(dim, {})[f"{node.op} reads it"] = None
    return {dim: tuple(reasons) for dim, reasons in found.items()}
