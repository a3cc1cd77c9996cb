"""What quantized layers read: where range is moved into their weights, and which ranges of it a grid covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regauge.ir.graph import Graph, Value
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.statistics import Statistics
from regauge.passes.quantization.placement import Placement, depth_of, place
from regauge.passes.quantization.ranges import Calibration, Ends, Histogram, ends_of
from regauge.passes.quantization.smoothing import Readers, Room, Smoothing, smoothing_of
from regauge.passes.quantization.smoothing_moves import readers_of, smooth_all
from regauge.passes.quantization.targets import Target
from regauge.passes.quantization.weights import rows_of


def smooth_values(
    graph: Graph, layers: Sequence[Layer], target: Target, exponent: float | None, batches: Sequence[Any], *, by: str
) -> tuple[int, int]:
    """Move range from what layers read into their weights; of how many values, and how many there are."""
    found = readers_of(graph, layers, batches, place(graph, layers, target).chained)

    def choose(readers: Readers, room: Room | None) -> Smoothing:
        return smoothing_of(readers, target.activations, target.weights, exponent, room)

    return smooth_all(graph, found, choose, nodes=True, by=by) if found else 0, len(found)


def ends_of_values(
    graph: Graph, placement: Placement, target: Target, way: Calibration | None, batches: Sequence[Any]
) -> dict[Value, Ends]:
    """The ranges of the values that a placement needs, on batches of inputs; without a way the least and greatest, and
    any where scales are the same whatever they are."""
    if target.activations.fixed:
        return dict.fromkeys(placement.measured, (-1.0, 1.0))
    statistics = Statistics(graph)
    histograms = {}
    for value in placement.measured:
        axis, importance = _importance(value, placement.layers)
        collector = Histogram(axis, importance, depth_of(graph, value, placement))
        histograms[value] = statistics.register(value, collector)
    statistics.collect(batches)
    return placement.aligned(
        {value: ends_of(found, target.activations, way or "minmax") for value, found in histograms.items()}
    )


def _importance(value: Value, layers: Sequence[Layer]) -> tuple[int, torch.Tensor] | tuple[None, None]:
    """The axis of a value that layers contract, and what the error of each of its indices makes in their outputs."""
    own = [layer for layer in layers if layer.node.inputs[0] is value]
    if not own or any(layer.blocks > 1 for layer in own):
        return None, None
    total = torch.zeros(own[0].columns // own[0].taps, dtype=torch.float64)
    for layer in own:
        total += rows_of(layer).square().sum(0).reshape(-1, layer.taps).sum(1)
    return (1 if own[0].node.op == "conv" else -1), total
