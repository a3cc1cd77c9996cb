"""Channels cut into several, each within a threshold (Zhang et al. 2023, FlattenQuant, section 3.2).

    x = clamp(x, -t, t) + (clamp(x, -2t, 2t) - clamp(x, -t, t)) + ... + the rest

A channel whose greatest magnitude is r becomes ceil(r / t) channels, and the columns of the layers that read it are
repeated: the products add up to what they were, while one scale for all channels need only reach t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regauge.ir.edit import Builder, set_input
from regauge.ir.graph import Graph, Value
from regauge.ir.storage.weight_edits import settle_successors
from regauge.passes.calibration.layers import Layer


@dataclass
class Parts:
    """Which channel each part is of, [parts], and between which magnitudes it lies; the last one has no end."""

    channel: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @property
    def growth(self) -> float:
        """Parts over channels."""
        return len(self.channel) / (int(self.channel.max()) + 1)


def parts_of(reach: torch.Tensor, threshold: float) -> Parts:
    """The parts of channels whose greatest magnitudes are ``reach`` [channels]."""
    counts = (reach / threshold - 1e-6).ceil().clamp(min=1).long()
    channel = torch.arange(len(reach)).repeat_interleave(counts)
    number = torch.arange(len(channel)) - (counts.cumsum(0) - counts)[channel]
    last = number == counts[channel] - 1
    high = torch.where(last, torch.inf, (number + 1) * threshold)
    return Parts(channel, (number * threshold).double(), high.double())


def threshold_of(reach: torch.Tensor, most: float) -> float:
    """The least threshold with no more than ``most`` times as many channels, and none that is cut without need.

    A threshold below the median would cut channels of the usual size, which gains a bit for twice the work.
    """
    least, high = float(reach.median()), float(reach.max())
    for _ in range(40):
        middle = (least + high) / 2
        if parts_of(reach, middle).growth <= most:
            high = middle
        else:
            least = middle
    return high


def split(graph: Graph, value: Value, layers: Sequence[Layer], parts: Parts, *, by: str) -> None:
    """Let layers read the parts of a value in its place."""
    build = Builder(graph, by=by)
    at = value.producer or layers[0].node
    assert isinstance(value.dtype, torch.dtype)
    bound = float(torch.finfo(value.dtype).max)

    def table(name: str, data: torch.Tensor) -> Value:
        return build.parameter(build.unique(f"{value.name}_{name}"), data, "buffer")

    low, high = (bounds.clamp(max=bound).to(value.dtype) for bounds in (parts.low, parts.high))
    with build.at(at):
        repeated = build.index_select(value, table("parts", parts.channel), dim=value.rank - 1)
        inner, outer = (
            build.minimum(build.maximum(repeated, table(f"{name}_from", -bounds)), table(f"{name}_to", bounds))
            for name, bounds in (("inner", low), ("outer", high))
        )
        flat = build.sub(outer, inner, name=f"{value.name}_flat")
    for layer in layers:
        sizes = list(layer.weight.weight.shape)
        sizes[layer.contracted] = len(parts.channel)
        axis = layer.contracted
        new = build.folded(layer.weight, lambda w, axis=axis: w.index_select(axis, parts.channel), shape=sizes)
        set_input(layer.node, 0, flat, graph)
        set_input(layer.node, 1, new, graph)
    settle_successors(graph, build)
