"""``arrange``: channels in order of magnitude, so that those of one size share a scale; the same function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from regauge.ir.dims.extents import Dim, leaves, positions_on
from regauge.ir.dims.groups import Group
from regauge.ir.dims.reorder import may_be_reordered, reorder
from regauge.ir.graph import Graph, Parameter, Value
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches
from regauge.passes.calibration.layers import Layer, contracting, layer_of
from regauge.passes.calibration.statistics import Spread, Statistics
from regauge.passes.options import option


@dataclass(frozen=True, kw_only=True)
class Arrange(Pass):
    """Order the channels that layers read by magnitude: neighbours share a scale in formats of groups and blocks.

    before  h = f(x w1')      y = h w2'
    after   h = f(x w1[o]')   y = h w2[:, o]'      o: the columns of w2 by falling length

    With ``activations`` it is the channels' own mean square that counts, on data, for blocks of activations and caches.
    A Dim that no layer reads, as that of queries and keys, is ordered by the rows that write it. The order is that of
    Drumond et al. (2024, Accurate Block Quantization) for keys; here every Dim that may be permuted takes part.
    """

    name: ClassVar[str] = "arrange"
    contract: ClassVar[Contract] = "exact"
    solves: ClassVar[bool] = True

    activations: bool = option(False, "by what channels are like on data, not by weights")

    def call(self, graph: Graph, context: Context) -> Graph:
        free = [group for group in graph.groups() if group.free]
        dims = may_be_reordered(graph, [group.dim for group in free])
        context.left["its order is read"] += len(free) - len(dims)
        layers = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
        sizes = _of_inputs(graph, layers, calibration_batches(graph, context)) if self.activations else {}
        orders: dict[Dim, np.ndarray] = {}
        for dim, readers in contracting(graph, dims, layers).items():
            found = [_read(graph, layer, dim, sizes) for layer in readers] or _written(graph, graph.axes.groups[dim])
            if found:
                score = torch.stack([part / part.mean().clamp(min=1e-30) for part in found]).amax(0)
                orders[dim] = np.argsort(-score.numpy(), kind="stable")
        moved = {dim: order for dim, order in orders.items() if bool((np.diff(order) != 1).any())}
        context.note(f"{len(moved)} Dims reordered")
        return reorder(graph, moved, by=self.name) if moved else graph


def _of_inputs(graph: Graph, layers: Sequence[Layer], batches: Sequence[Any]) -> dict[Value, torch.Tensor]:
    """The mean square of each channel that a layer reads."""
    statistics = Statistics(graph)
    axes = {layer.node.inputs[0]: 1 if layer.taps > 1 or layer.node.op == "conv" else -1 for layer in layers}
    found = {x: statistics.register(x, Spread(axis)) for x, axis in axes.items() if isinstance(x, Value)}
    if found:
        statistics.collect(batches)
    return {x: spread.mean_square for x, spread in found.items()}


def _read(graph: Graph, layer: Layer, dim: Dim, sizes: dict[Value, torch.Tensor]) -> torch.Tensor:
    """The mean square of the columns of each index, or with ``sizes`` of the channels that they multiply."""
    columns = torch.from_numpy(layer.columns_of(graph, dim))
    if sizes:
        by_channel = sizes[layer.node.inputs[0]]  # type: ignore[index]
        return by_channel[columns // layer.taps].mean(1)
    return layer.matrix(layer.weight.tensor.detach()).double().square().mean(0)[columns].mean(1)


def _written(graph: Graph, group: Group) -> list[torch.Tensor]:
    """The mean square of what each parameter of two axes or more holds for each index."""
    found = []
    for parameter, axis in group.members:
        if isinstance(parameter, Parameter) and parameter.rank > 1 and parameter.kind == "parameter":
            extent = graph.axes.of[parameter][axis]
            if leaves(extent).count(group.dim) == 1:
                rows = parameter.tensor.detach().double().square().movedim(axis, 0).flatten(1).mean(1)
                found.append(rows[torch.from_numpy(positions_on(extent, group.dim))].mean(1))
    return found
