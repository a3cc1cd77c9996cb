"""PAT (Liu et al. 2024, Pruning-Aware Tuning): hybrid sparsification modules, folded into the weights at the end."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.groups import Member
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.calibration.layers import Layer
from regauge.passes.training.learned import LearnedSparsifier, straight_through
from regauge.passes.training.places import multiplied
from regauge.passes.training.target import Target

_SMALL = 1e-6
_START = 0.1  # mean logit of a mask at first
_MASK_SHARE = 0.8  # of all steps: from then on the mask is fixed, and the operators go on


class Hsm(LearnedSparsifier):
    """Behind each layer that makes a Dim: y = v m (x + D2 D1 x), with one mask m for all layers of the Dim.

    D1 has ``rank`` rows, orthonormal at first, D2 is zero at first, v one. The mask is sigmoid(theta / temperature) +
    max(0.5 - t / T, 0), at most 1, with the temperature 1 - log t / log T until 0.8 T, when the mask becomes 0 and 1
    for good. :meth:`loss` is 10 |share - wanted| / wanted, with the share of MACs, parameters or indices whose theta
    is 0 or above (straight-through), plus the means of (theta - 0.5)^2 over those above 0 and of (theta + 0.5)^2 over
    the others, plus the mean of squares of D1 D1' - I. After T = ``learning`` steps the operators are part of the
    weights. This is as in the authors' code.

    Layers are linear maps and convolutions whose output is the Dim alone; other parameters that make the Dim
    (embeddings, gains) take the mask only. Deviations: any free Dim, not only the residual stream (which
    ``Target(normalised=True)`` adds); the target may be a budget; theta starts at a tenth of the norm of each index,
    relative to the mean, where the code starts at 0, so that indices of a Dim do not cross zero all at once, and the
    mask is held to 1 therefore; from 0.8 T on the code keeps the soft mask, and rounds it at the end; D1 starts
    orthonormal; ``rank`` is 8, where the paper's models of thousands of channels have 200; the count has the gradient
    of the sigmoid, where the code's is 1, which among Dims of unlike cost narrows one or two to almost nothing (on
    digits 78 % are right at 0.2 of the MACs instead of 91 %).
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        target: Target,
        *,
        learning: int = 1000,
        rate: float = 0.01,
        rank: int = 8,
        size_weight: float = 10.0,
    ) -> None:
        if rank < 1:
            raise PassError(f"rank={rank} is out of range: write 1 or more")
        self.rank, self.size_weight = rank, size_weight
        super().__init__(model, graph, target, learning=learning, rate=rate)

    def _make_learned(self) -> None:
        self._layers = self.making_layers()
        self._others: dict[Dim, list[Member]] = {}
        for dim in self.dims:
            norm = self.squares(dim).sqrt()
            self._learn(f"theta.{dim.name}", _START * norm / norm.mean().clamp(min=1e-12))
            for layer in self._layers[dim]:
                self._make_operator(layer)
            taken = {p for layer in self._layers[dim] for p in (layer.weight, layer.bias)}
            self._others[dim] = [member for member in self._makers[dim] if member.parameter not in taken]

    def _make_operator(self, layer: Layer) -> None:
        size, name = layer.outputs, layer.weight.name
        generator = torch.Generator().manual_seed(len(self.learned))
        drawn = torch.randn(size, min(self.rank, size), generator=generator)
        self._learn(f"down.{name}", torch.linalg.qr(drawn)[0].T)
        self._learn(f"up.{name}", torch.zeros(size, min(self.rank, size)))
        self._learn(f"gain.{name}", torch.ones(size))

    @property
    def mask_steps(self) -> int:
        """The step at which the mask is fixed."""
        return max(1, round(_MASK_SHARE * self.learning))

    def _theta(self, dim: Dim) -> nn.Parameter:
        return self.learned[f"theta.{dim.name}"]

    def gates(self) -> dict[Dim, torch.Tensor]:
        if self.steps >= self.mask_steps:
            return {dim: torch.as_tensor(alive, device=self._device).float() for dim, alive in self.alive.items()}
        temperature = 1 - math.log(max(self.steps, 1)) / math.log(max(self.learning, 2)) + _SMALL
        bias = max(0.5 - self.steps / self.learning, 0.0)
        return {dim: (torch.sigmoid(self._theta(dim) / temperature) + bias).clamp(max=1) for dim in self.dims}

    def ranking(self) -> dict[Dim, np.ndarray]:
        return {dim: self._theta(dim).detach().cpu().double().numpy() for dim in self.dims}

    def loss(self) -> torch.Tensor:
        if self.fixed:
            return super().loss()
        downs = [tensor for name, tensor in self.learned.items() if name.startswith("down.")]
        errors = [(d @ d.T - torch.eye(len(d), device=d.device)).square().mean() for d in downs]
        total = torch.stack(errors).mean() if errors else super().loss()
        if self.steps >= self.mask_steps:
            return total
        logits = {dim: self._theta(dim) for dim in self.dims}
        kept = {dim: straight_through(torch.sigmoid(t), t >= 0).sum() for dim, t in logits.items()}
        over = (self.share(kept) / self.share.wanted - 1).abs()
        every = torch.cat(list(logits.values()))
        for side in (every[every > 0] - 0.5, every[every <= 0] + 0.5):
            total = total + (side.square().mean() if len(side) else 0)
        return total + self.size_weight * over

    def _weights(self) -> dict[Parameter, torch.Tensor]:
        gates = self.gates()
        along = self.along(gates, self._others)
        found = {p: multiplied(self.bound.tensor(p), axes) for p, axes in along.items()}
        for dim, layers in self._layers.items():
            for layer in layers:
                found[layer.weight] = layer.stored(self._operated(layer, layer.weight, gates[dim]))
                if layer.bias is not None:
                    found[layer.bias] = self._operated(layer, layer.bias, gates[dim])
        return found

    def _operated(self, layer: Layer, parameter: Parameter, mask: torch.Tensor) -> torch.Tensor:
        """v m (x + D2 D1 x) on the rows of a layer's matrix, or on its bias."""
        tensor = self.bound.tensor(parameter)
        parts = (self.learned[f"{part}.{layer.weight.name}"].to(tensor.dtype) for part in ("down", "up", "gain"))
        down, up, gain = parts
        rows = layer.matrix(tensor) if parameter is layer.weight else tensor[:, None]
        result = (gain * mask.to(tensor.dtype))[:, None] * (rows + up @ (down @ rows))
        return result if parameter is layer.weight else result[:, 0]

    def _step(self) -> None:
        if self.steps == self.mask_steps:
            self.alive = self.plan.survivors(self.ranking(), self.alive, 1.0)
        super()._step()

    def _fold(self) -> None:
        for parameter, tensor in self._weights().items():
            self.bound.tensor(parameter).copy_(tensor)
