"""Maestro (Horváth et al. 2024): ranks found by dropping the last directions of bonds at random while training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.training.bond_sparsifier import Bond, BondSparsifier
from regauge.passes.training.bound_model import ForwardWeights


class OrderedDropout(BondSparsifier):
    """In each step of training one bond, drawn at random, keeps its first k indices, k drawn from 1 to its rank.

    So the first directions learn to matter most: of a linear map on uniform data they become its singular vectors, of
    an autoencoder the principal components. :meth:`loss` is a group lasso on what lies behind each index,

        penalty * sum over bonds and k of  |U[:, k:]| + |V[:, k:]|

    and a bond shrinks to k for good as soon as |U[:, k:]| |V[:, k:]| is at most ``tolerance`` (progressive shrinking).
    In evaluation all ranks are those found so far. After ``learning`` steps ranks are fixed; :meth:`finish` brings the
    bonds into singular form and cuts them.

    The model has factors where ranks are to be found: of full rank, as
    :func:`regauge.training.full_rank_factors` makes them, or as it was built. Deviation: ``tolerance`` is a share of
    |U| |V|, so that it means the same for all layers.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        *,
        learning: int = 1000,
        penalty: float = 1e-3,
        tolerance: float = 1e-3,
        include: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        if learning < 1 or penalty < 0 or not 0 <= tolerance < 1:
            raise PassError("OrderedDropout has learning >= 1 steps, penalty >= 0 and a tolerance from 0 to below 1")
        super().__init__(model, graph, include)
        self.learning, self.penalty, self.tolerance = learning, penalty, tolerance
        self._generator = torch.Generator().manual_seed(seed)
        self._forward = ForwardWeights(self.bound, self._weights)

    @property
    def last_step(self) -> int:
        return self.learning

    def _drawn(self, most: int) -> int:
        return int(torch.randint(most, (), generator=self._generator))

    def _weights(self) -> dict[Parameter, torch.Tensor]:
        ranks = dict(self.ranks)
        if self.bound.model.training and self.steps < self.learning:
            bond = self.bonds[self._drawn(len(self.bonds))]
            ranks[bond] = 1 + self._drawn(ranks[bond])
        return self.cut_to(ranks)

    def tails(self, bond: Bond, side: int) -> torch.Tensor:
        """The norms of what lies behind the first k indices, k from 0 to the size less one."""
        squares = self.squares(bond, side)[: self.ranks[bond]]
        return (squares.flip(0).cumsum(0).flip(0) + 1e-24).sqrt()

    def loss(self) -> torch.Tensor:
        if self.steps >= self.learning:
            return super().loss()
        return self.penalty * torch.stack([self.tails(b, side).sum() for b in self.bonds for side in (0, 1)]).sum()

    def _step(self) -> None:
        if self.steps <= self.learning:
            for bond in self.bonds:
                product = self.tails(bond, 0) * self.tails(bond, 1)
                self.ranks[bond] = max(1, int((product > self.tolerance * product[0]).sum()))
        self.truncate()

    def _finish(self) -> Graph:
        self._forward.remove()
        return super()._finish()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._generator.set_state(state["generator"])
