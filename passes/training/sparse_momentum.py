"""Sparse momentum (Dettmers and Zettlemoyer 2019, Sparse Networks from Scratch): entries move to where they help."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.training.weight_masks import WeightSparsifier, largest


class SparseMomentum(WeightSparsifier):
    """A share ``density`` of each weight's entries is there from the start; now and then some move.

    Every ``every`` steps (an epoch, in the paper), until ``moves`` times: in each layer the share p of the entries that
    are smallest is removed; all that were removed are given to layers in proportion to the mean magnitude of momentum
    of their entries; in each layer those entries grow, from zero, whose momentum is largest (their algorithm).
    p falls from ``prune_rate`` to 0 as a cosine. Layers start with the same density, at random places.

    Momentum is an exponential mean of gradients with factor ``momentum``, kept here so that any optimizer will do; it
    reads ``.grad``. Deviation: the overall number of entries is kept exactly; what a full layer cannot take goes to the
    next one with the largest share.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        density: float = 0.5,
        *,
        every: int = 100,
        moves: int = 10,
        prune_rate: float = 0.5,
        momentum: float = 0.9,
        seed: int = 0,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> None:
        if not 0 < density < 1 or not 0 < prune_rate < 1 or every < 1:
            raise PassError("SparseMomentum has a density and a prune_rate between 0 and 1, and every >= 1")
        super().__init__(model, graph, include=include, exclude=exclude)
        self.density, self.every, self.moves = density, every, moves
        self.prune_rate, self.momentum = prune_rate, momentum
        generator = torch.Generator().manual_seed(seed)
        for parameter, mask in self.masks.items():
            drawn = torch.rand(mask.shape, generator=generator).to(mask.device)
            self.masks[parameter] = largest(drawn, round(density * mask.numel()))
        self._means = {p: torch.zeros_like(self.bound.tensor(p), dtype=torch.float32) for p in self.axes}
        with torch.no_grad():
            self.apply()

    @property
    def last_step(self) -> int:
        return self.every * self.moves

    def _step(self) -> None:
        for parameter, mean in self._means.items():
            gradient = self.bound.tensor(parameter).grad
            if gradient is None:
                raise PassError("SparseMomentum reads gradients: call step() before optimizer.zero_grad()")
            mean.mul_(self.momentum).add_(gradient.float(), alpha=1 - self.momentum)
        if self.steps % self.every == 0 and self.steps <= self.last_step:
            move = self.steps // self.every
            self._move(self.prune_rate * 0.5 * (1 + math.cos(math.pi * move / self.moves)))
        self.apply()

    def _move(self, rate: float) -> None:
        """Remove a share of the smallest entries, and let as many grow."""
        shares = {p: float(self._means[p].abs()[mask].mean()) for p, mask in self.masks.items() if mask.any()}
        removed = 0
        for parameter, mask in self.masks.items():
            count = int(mask.sum())
            goes = int(rate * count)
            size = self.bound.tensor(parameter).float().abs().where(mask, -1.0)
            self.masks[parameter] = largest(size, count - goes)
            removed += goes
        for parameter, count in self._distributed(removed, shares).items():
            slope = self._means[parameter].abs().where(~self.masks[parameter], -1.0)
            self.masks[parameter] = self.masks[parameter] | largest(slope, count)

    def _distributed(self, removed: int, shares: Mapping[Parameter, float]) -> dict[Parameter, int]:
        """How many entries grow in each layer: in proportion to the shares, as far as there is room."""
        whole = sum(shares.values())
        room = {p: int((~mask).sum()) for p, mask in self.masks.items()}
        found = {p: min(room[p], int(removed * share / whole) if whole > 0 else 0) for p, share in shares.items()}
        left = removed - sum(found.values())
        for parameter in sorted(shares, key=lambda p: -shares[p]):
            more = min(left, room[parameter] - found[parameter])
            found[parameter] += more
            left -= more
        return found

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "means": {p.name: mean.clone() for p, mean in self._means.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._means = {p: state["means"][p.name].clone() for p in self._means}
