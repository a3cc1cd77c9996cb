"""The moments of what layers are given, gathered in one run of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from regauge.ir.graph import Graph
from regauge.ir.lockstep import Lockstep
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Moments


def visit_moments(graph: Graph, layers: Iterable[Layer], batches: Sequence[Any]) -> Iterator[tuple[Layer, Moments]]:
    """Each layer (of one block) with the moments of its inputs, in the order of the graph, in one run of it."""
    by_node = {layer.node: layer for layer in layers}
    if not by_node:
        return
    run = Lockstep(graph, batches)
    for node in run.steps():
        layer = by_node.get(node)
        if layer is None:
            continue
        moments = Moments(layer.columns)
        for x in run.values(node.inputs[0]):
            moments.add(layer.rows_of_input(x))
        moments.check(node.label)
        yield layer, moments
