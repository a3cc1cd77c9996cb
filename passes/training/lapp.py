"""LAPP (Zhai et al. 2023, Layer Adaptive Progressive Pruning): a threshold for each Dim, learnt with the weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from regauge.ir.extents import Dim
from regauge.ir.graph import Graph
from regauge.passes.training.learned import LearnedSparsifier, straight_through
from regauge.passes.training.target import Target


class Lapp(LearnedSparsifier):
    """An index is open where its norm exceeds the threshold of its Dim; thresholds learn from the loss and the target.

    The norm is that of the slices that make the index, divided by the mean over the Dim. The gate 1[s > t] has the
    gradient of sigmoid((s - t) / ``temperature``) (straight-through), and :meth:`loss` is
    ``penalty`` (share(t) / wanted - 1)^2, with the share of MACs, parameters or indices that is open. After
    ``learning`` steps the target is met exactly: what goes is what lies furthest below its threshold.

    Deviations: the form of gate and penalty is our reading of the paper's abstract and summaries; its bypass of light
    convolutions beside pruned ones is left out; no gradient reaches the weights through the norms.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        target: Target,
        *,
        learning: int = 1000,
        rate: float = 0.01,
        penalty: float = 1.0,
        temperature: float = 0.2,
    ) -> None:
        self.penalty, self.temperature = penalty, temperature
        super().__init__(model, graph, target, learning=learning, rate=rate)

    def _make_learned(self) -> None:
        for dim in self.dims:
            self._learn(dim.name, torch.zeros(()))

    def margins(self) -> dict[Dim, torch.Tensor]:
        """Norm minus threshold of every index."""
        found = {}
        for dim in self.dims:
            norm = self.squares(dim).detach().sqrt()
            found[dim] = norm / norm.mean().clamp(min=1e-12) - self.learned[dim.name]
        return found

    def gates(self) -> dict[Dim, torch.Tensor]:
        return {
            dim: straight_through(torch.sigmoid(margin / self.temperature), margin > 0)
            for dim, margin in self.margins().items()
        }

    def ranking(self) -> dict[Dim, np.ndarray]:
        return {dim: margin.detach().cpu().double().numpy() for dim, margin in self.margins().items()}

    def loss(self) -> torch.Tensor:
        if self.fixed:
            return super().loss()
        share = self.share({dim: gate.sum() for dim, gate in self.gates().items()})
        return self.penalty * (share / self.share.wanted - 1).square()
