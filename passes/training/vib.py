"""VTrans (Dutta et al. 2024): masks by the variational information bottleneck, with a Lagrangian on the size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from regauge.ir.dims.extents import Dim
from regauge.ir.graph import Graph
from regauge.passes.training.learned import LearnedSparsifier
from regauge.passes.training.target import Target

_START = -6.0  # log of sigma^2 / mu^2 at first: hardly any noise


def kl_term(mu: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """0.5 log(1 + mu^2 / sigma^2) of each gate: the divergence from the prior N(0, s^2) with the best s.

    Dai et al. 2018, Compressing Neural Networks using the Variational Information Bottleneck.
    """
    return 0.5 * torch.log1p(mu.square() / log_variance.exp())


class Vib(LearnedSparsifier):
    """Every index has a noisy gate z = mu + sigma e; what carries no more than its noise goes.

    In training e is normal, drawn anew for each forward pass; in evaluation it is 0. :meth:`loss` is ``kl_weight``
    times the mean of :func:`kl_term` over all gates, plus a (s - wanted) + b (s - wanted)^2, with s the share of MACs,
    parameters or indices that is kept when an index counts sigmoid(log(mu^2 / sigma^2)); a and b rise by the gradient
    of that term at ``multiplier_rate`` (Wang et al. 2020, Structured Pruning of Large Language Models, whom VTrans
    follows). An index is redundant where log(sigma^2 / mu^2) > 0; after ``learning`` steps those that are most
    so go until the target is met, and mu goes into the weights.

    Deviations: one draw for all examples of a batch, on the weights rather than on activations, so that it costs
    nothing and needs no change of the model; all free Dims are gated, where the paper names embeddings, heads, hidden
    units and layers; the mean of the terms where the paper sums them, so that ``kl_weight`` does not depend on the
    number of gates.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        target: Target,
        *,
        learning: int = 1000,
        rate: float = 0.02,
        kl_weight: float = 0.01,
        multiplier_rate: float = 0.05,
        seed: int = 0,
    ) -> None:
        self.kl_weight, self.multiplier_rate = kl_weight, multiplier_rate
        super().__init__(model, graph, target, learning=learning, rate=rate)
        self._generator = torch.Generator().manual_seed(seed)
        self.multipliers = torch.zeros(2, device=self._device)
        self._violation = 0.0

    def _make_learned(self) -> None:
        for dim in self.dims:
            self._learn(f"mu.{dim.name}", torch.ones(int(dim.size)))
            self._learn(f"log_variance.{dim.name}", torch.full((int(dim.size),), _START))

    def _mu(self, dim: Dim) -> nn.Parameter:
        return self.learned[f"mu.{dim.name}"]

    def _log_variance(self, dim: Dim) -> nn.Parameter:
        return self.learned[f"log_variance.{dim.name}"]

    def signal(self, dim: Dim) -> torch.Tensor:
        """log(mu^2 / sigma^2) of every index."""
        return (self._mu(dim).square() + 1e-12).log() - self._log_variance(dim)

    def gates(self) -> dict[Dim, torch.Tensor]:
        found: dict[Dim, torch.Tensor] = {}
        for dim in self.dims:
            mu = self._mu(dim)
            found[dim] = mu
            if self.bound.model.training:
                noise = torch.randn(mu.shape, generator=self._generator).to(mu.device)
                found[dim] = mu + (0.5 * self._log_variance(dim)).exp() * noise
        return found

    def ranking(self) -> dict[Dim, np.ndarray]:
        return {dim: self.signal(dim).detach().cpu().double().numpy() for dim in self.dims}

    def loss(self) -> torch.Tensor:
        if self.fixed:
            return super().loss()
        terms = torch.cat([kl_term(self._mu(dim), self._log_variance(dim)) for dim in self.dims])
        share = self.share({dim: torch.sigmoid(self.signal(dim)).sum() for dim in self.dims})
        over = share - self.share.wanted
        self._violation = float(over.detach())
        return self.kl_weight * terms.mean() + self.multipliers[0] * over + self.multipliers[1] * over.square()

    def _step(self) -> None:
        if not self.fixed and math.isfinite(self._violation):
            rise = torch.tensor([self._violation, self._violation**2], device=self._device)
            self.multipliers += self.multiplier_rate * rise
        super()._step()

    def _fold(self) -> None:
        self.scale({dim: self._mu(dim).detach() for dim in self.dims}, self.gated)

    def state_dict(self) -> dict[str, Any]:
        noise = self._generator.get_state()
        return {**super().state_dict(), "multipliers": self.multipliers.clone(), "generator": noise}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.multipliers = state["multipliers"].clone().to(self._device)
        self._generator.set_state(state["generator"])
