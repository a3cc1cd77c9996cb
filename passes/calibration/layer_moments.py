"""The moments of what layers are given, gathered in one run of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from regauge.ir.graph import Graph
from regauge.ir.running.lockstep import Lockstep
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
        yield layer, moments_of(layer, run.values(node.inputs[0]))[0]


def moments_of(
    layer: Layer,
    inputs: Sequence[torch.Tensor],
    targets: Iterable[torch.Tensor] | None = None,
    ends: Sequence[torch.Tensor] | None = None,
) -> list[Moments]:
    """Of each block, over all batches: of what it is given and, where there are targets, of what it should give.

    ``ends`` are the offsets of a ``grouped_mm`` in each batch, by which rows belong to blocks.
    """
    found = [Moments(layer.columns, 0 if targets is None else layer.outputs) for _ in range(layer.blocks)]
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor | None]]
    pairs = ((x, None) for x in inputs) if targets is None else zip(inputs, targets, strict=True)
    offsets: Sequence[torch.Tensor | None] = ends or [None] * len(inputs)
    for (x, y), own in zip(pairs, offsets, strict=True):
        rows = [None] * layer.blocks if y is None else layer.blocks_of_output(y, own)
        for moments, x_rows, y_rows in zip(found, layer.blocks_of_input(x, own), rows, strict=True):
            moments.add(x_rows, y_rows)
    for moments in found:
        moments.check(layer.node.label)
    return found
