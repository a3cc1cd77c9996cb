"""What a change of a graph does to its outputs, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regauge.ir.graph import Graph
from regauge.ir.interpret import run
from regauge.passes.calibration.batches import examples_in


class Probe:
    """The outputs of a graph on a few examples, to compare with what it gives with other weights or sizes."""

    def __init__(self, graph: Graph, batches: Sequence[Any]) -> None:
        self.graph, self.batches = graph, batches
        self.expected: list[list[torch.Tensor]] = []
        self.examples = max(1, sum(map(examples_in, batches)))

    @property
    def rows(self) -> int:
        """How many vectors the outputs are on all batches: entries over the size of their last axis."""
        return sum(y[..., 0].numel() if y.dim() else 1 for outputs in self._known() for y in outputs if y.numel())

    def change(self, weights: Mapping[str, torch.Tensor] | None = None, *, graph: Graph | None = None) -> float:
        """The squared change of the outputs per example, with other weights or of another graph."""
        total = 0.0
        for batch, expected in zip(self.batches, self._known(), strict=True):
            for y, before in zip(_outputs(graph or self.graph, batch, weights or {}), expected, strict=True):
                total += float((y - before).square().sum())
        return total / self.examples

    def _known(self) -> list[list[torch.Tensor]]:
        """What the graph gives for each batch."""
        if not self.expected:
            self.expected = [_outputs(self.graph, batch, {}) for batch in self.batches]
        return self.expected


def _outputs(graph: Graph, batch: Any, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    found = run(graph, batch, weights=dict(weights))
    return [y.double() for y in found if isinstance(y, torch.Tensor) and y.is_floating_point()]
