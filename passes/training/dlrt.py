"""Dynamical low-rank training: factors whose ranks follow what the gradient asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.training.bond_sparsifier import Bond, BondSparsifier
from regauge.passes.training.factor_integrator import PHASES, Integrator
from regauge.passes.training.factor_pairs import chains


class Dlrt(BondSparsifier):
    """Factor pairs, and kernels in Tucker form, are trained by integrators that change their ranks as they go.

    Low-rank lottery tickets (Schotthöfer et al. 2022), and its version for convolutions as Tucker (Zangrando et al.
    2023): see :mod:`regauge.passes.training.factor_integrator`. Three calls of :meth:`step`, each behind a backward
    pass, make one step of the weights at ``rate``: two of bases, one of the core, which is then truncated to the
    fewest directions that lose at most ``tolerance`` of its norm. Ranks begin as those of the factors, and are at most
    as large as the bonds. Biases, norms and all other layers are the optimizer's; it may hold the factors too, what it
    does to them is overwritten. After ``learning`` steps ranks and factors are fixed.

    Deviations: each of the three gradients is of the batch of its own step; other parameters move in between.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        *,
        learning: int = 1500,
        rate: float = 0.05,
        tolerance: float = 0.05,
        include: tuple[str, ...] = (),
    ) -> None:
        if learning < PHASES or rate <= 0 or not 0 <= tolerance < 1:
            raise PassError(f"Dlrt has learning >= {PHASES} steps, a rate above 0 and a tolerance from 0 to below 1")
        super().__init__(model, graph, include)
        self.learning = -(-learning // PHASES) * PHASES
        self.integrators: dict[tuple[Bond, Bond], Integrator] = {}
        with torch.no_grad():
            for bonds, chain in chains(self.bonds, graph, self.left).items():
                integrator = Integrator(chain, self.bound.tensor, rate, tolerance)
                integrator.write(0)
                self.integrators[bonds] = integrator
        if not self.integrators:
            raise PassError("Dlrt finds no pair of layers and no kernel between two: factorize layers first")
        self._note_ranks()

    @property
    def last_step(self) -> int:
        return self.learning

    def _step(self) -> None:
        if self.steps > self.learning:
            return
        for integrator in self.integrators.values():
            integrator.step((self.steps - 1) % PHASES)
        self._note_ranks()

    def _note_ranks(self) -> None:
        for (outputs, inputs), integrator in self.integrators.items():
            self.ranks[outputs], self.ranks[inputs] = integrator.ranks

    def state_dict(self) -> dict[str, Any]:
        held = {
            outputs.dim.name: {"core": i.core, "bases": i.bases, "moved": list(i.moved)}
            for (outputs, _), i in self.integrators.items()
        }
        return {**super().state_dict(), "integrators": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for (outputs, _), integrator in self.integrators.items():
            own = state["integrators"][outputs.dim.name]
            integrator.core, integrator.bases, integrator.moved = own["core"], own["bases"], list(own["moved"])
            with torch.no_grad():
                integrator.write(self.steps % PHASES)
