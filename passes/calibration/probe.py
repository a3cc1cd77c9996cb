"""Measures how a change of a graph changes its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.ir.running.lockstep import HELD
from regauge.passes.calibration.batches import examples_in


class Probe:
    """The outputs of a graph on a few examples, to compare with what it gives with other weights or sizes.

    They are held where they fit into :data:`regauge.ir.running.lockstep.HELD`, else computed at each comparison.
    """

    def __init__(self, graph: Graph, batches: Sequence[Any]) -> None:
        self.graph, self.batches = graph, batches
        self.examples = max(1, sum(map(examples_in, batches)))
        self._held: dict[int, list[torch.Tensor]] = {}
        self._rows: dict[int, int] = {}

    @property
    def rows(self) -> int:
        """How many vectors the outputs are on all batches: entries over the size of their last axis."""
        for place in range(len(self.batches)):
            if place not in self._rows:
                self._expected(place)
        return sum(self._rows.values())

    def change(self, weights: Mapping[str, torch.Tensor] | None = None, *, graph: Graph | None = None) -> float:
        """The squared change of the outputs per example, with other weights or of another graph."""
        total = 0.0
        for place, batch in enumerate(self.batches):
            found = _outputs(graph or self.graph, batch, weights or {})
            for y, before in zip(found, self._expected(place), strict=True):
                total += float((y.double() - before.double()).square().sum())
        return total / self.examples

    def _expected(self, place: int) -> list[torch.Tensor]:
        """What the graph gives for a batch."""
        if place in self._held:
            return self._held[place]
        found = _outputs(self.graph, self.batches[place], {})
        self._rows[place] = sum(y[..., 0].numel() if y.dim() else 1 for y in found if y.numel())
        if sum(y.nbytes for outputs in (found, *self._held.values()) for y in outputs) <= HELD:
            self._held[place] = found
        return found


def _outputs(graph: Graph, batch: Any, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    found = run(graph, batch, weights=dict(weights))
    return [y for y in found if isinstance(y, torch.Tensor) and y.is_floating_point()]
