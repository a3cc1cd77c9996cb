"""LAPP (Zhai et al. 2023, Layer Adaptive Progressive Pruning): a threshold for each Dim, learnt with the weights."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from regauge.ir.dims.extents import Dim
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.calibration.layers import Layer
from regauge.passes.training.learned import LearnedSparsifier, straight_through
from regauge.passes.training.places import multiplied
from regauge.passes.training.target import Target


class Lapp(LearnedSparsifier):
    """An index is open where its norm exceeds the threshold of its Dim; thresholds learn from the loss and the target.

    The norm is that of the slices that make the index, divided by the mean over the Dim. The gate 1[s > t] has the
    gradient of sigmoid((s - t) / ``temperature``) (straight-through), and :meth:`loss` is
    ``penalty`` (share(t) / wanted - 1)^2, with the share of MACs, parameters or indices that is open. After
    ``learning`` steps the target is met exactly: what goes is what lies furthest below its threshold.

    A layer that narrows blocks what flows through it while the others learn, so each layer that makes a Dim has a light
    bypass beside it, a layer to ``bypass`` channels and a pointwise one back, zero at first:

        y_i = g_i W_i x + (U V x)_i        what reads y_i is multiplied by g_i + (1 - g_i) (1 - t / T)

    An open index has both; of a closed one only the bypass is left, and fades out until step T = ``learning``, when U V
    becomes part of W for good. So nothing of it is left in the network. A Dim with a layer that is no heavier than its
    bypass has none; ``bypass=0`` leaves it out. On digits, three seeds each, it was worth +1.1, +1.3, -2.9 and -2.5
    points of accuracy at 0.3, 0.15, 0.1 and 0.05 of the MACs.

    Deviations: the form of gate, penalty and bypass is our reading of the paper's abstract and summaries, which say
    that there is a light bypass for each convolution to be pruned and not what becomes of it; linear maps have one too.
    No gradient reaches the weights through the norms.
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
        bypass: int = 4,
    ) -> None:
        if bypass < 0:
            raise PassError(f"bypass={bypass} is out of range: write a number of channels, or 0 for none")
        self.penalty, self.temperature, self.bypass = penalty, temperature, bypass
        super().__init__(model, graph, target, learning=learning, rate=rate)

    def _make_learned(self) -> None:
        self._bypassed: dict[Dim, list[Layer]] = {}
        for dim, layers in self.making_layers().items():
            self._learn(dim.name, torch.zeros(()))
            light = [x for x in layers if self.bypass * (x.outputs + x.columns) < x.outputs * x.columns]
            self._bypassed[dim] = light if self.bypass and len(light) == len(layers) else []
            for layer in self._bypassed[dim]:
                generator = torch.Generator().manual_seed(len(self.learned))
                drawn = torch.randn(self.bypass, layer.columns, generator=generator)
                self._learn(f"bypass.in.{layer.weight.name}", drawn / math.sqrt(layer.columns))
                self._learn(f"bypass.out.{layer.weight.name}", torch.zeros(layer.outputs, self.bypass))

    def _beside(self, layer: Layer) -> torch.Tensor:
        """The bypass of a layer as a matrix [outputs, columns]."""
        down, up = (self.learned[f"bypass.{part}.{layer.weight.name}"] for part in ("in", "out"))
        return up @ down

    def _weights(self) -> dict[Parameter, torch.Tensor]:
        gates = self.gates()
        if not any(self._bypassed.values()):
            return super()._weights()
        fading = 1 - self.steps / self.learning
        factors = {dim: gate + (1 - gate) * fading if self._bypassed[dim] else gate for dim, gate in gates.items()}
        found: dict[Parameter, torch.Tensor] = {}
        for dim, layers in self._bypassed.items():
            for layer in layers:
                rows = layer.matrix(self.bound.tensor(layer.weight))
                found[layer.weight] = layer.stored(gates[dim][:, None].to(rows.dtype) * rows + self._beside(layer))
        for parameter, axes in self.along(factors, self.gated).items():
            found[parameter] = multiplied(found.get(parameter, self.bound.tensor(parameter)), axes)
        return found

    def _fold(self) -> None:
        for layers in self._bypassed.values():
            for layer in layers:
                tensor = self.bound.tensor(layer.weight)
                tensor.copy_(layer.stored(layer.matrix(tensor) + self._beside(layer)))

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
