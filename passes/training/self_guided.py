"""Self-guided training of factors: a dense layer beside each pair shows the way, and fades out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.sizes.expressions import evaluate
from regauge.passes.training.bond_sparsifier import Bond, BondSparsifier
from regauge.passes.training.factor_pairs import Chain, chains


class SelfGuided(BondSparsifier):
    """While factors are trained, a dense layer with weight W takes part in each pair, by a share a that falls to zero:

        y = a W x + (1 - a) up (down x)      a = (1 + cos(pi t / learning)) / 2

    Factors that are trained from scratch end worse than dense layers, as their loss is harder to go down (Wei et al.
    2024, Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers, section 4).
    W begins as up down, and is trained by an Adam of its own at ``rate``. After ``learning`` steps the model is its
    factors alone, and :meth:`finish` brings them into singular form.

    Deviation: the dense layer always runs, where the paper later lets it run at random to save time.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        *,
        learning: int = 1000,
        rate: float = 1e-3,
        include: tuple[str, ...] = (),
    ) -> None:
        if learning < 1 or rate <= 0:
            raise PassError("SelfGuided has learning >= 1 steps and a rate above 0")
        super().__init__(model, graph, include)
        self.learning = learning
        self.dense: dict[Bond, nn.Parameter] = {}
        self._inputs: dict[Bond, torch.Tensor] = {}
        self._hooks: list[Any] = []
        for (bond, other), chain in chains(self.bonds, self.graph, self.left).items():
            if bond is other and self._watch(bond, chain):
                self.dense[bond] = nn.Parameter(self._product(chain))
        if not self.dense:
            raise PassError("SelfGuided finds no pair of layers that are modules of their own")
        self._optimizer = torch.optim.Adam(self.dense.values(), lr=rate)

    @property
    def last_step(self) -> int:
        return self.learning

    @property
    def share(self) -> float:
        """The current weight a of the dense layers in the outputs of the pairs."""
        return 0.5 * (1 + math.cos(math.pi * min(1.0, self.steps / self.learning)))

    def _product(self, chain: Chain) -> torch.Tensor:
        """up down, in the shape of a weight of the first layer's kind."""
        up, down = (layer.matrix(self.bound.tensor(layer.weight).detach()) for layer in (chain.up, chain.down))
        matrix = up @ down
        if chain.down.node.op == "linear":
            return matrix
        return matrix.reshape(len(matrix), -1, *self.bound.tensor(chain.down.weight).shape[2:])

    def _watch(self, bond: Bond, chain: Chain) -> bool:
        if chain.down.node.op not in ("linear", "conv"):
            self.left["a pair is no linear layers or convolutions"] += 1
            return False
        first, last = (self.bound.places(layer.weight) for layer in (chain.down, chain.up))
        if any(not isinstance(owner, nn.Linear | nn.modules.conv._ConvNd) for owner, _ in (*first, *last)):
            self.left["a layer is no module of its own"] += 1
            return False

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._inputs[bond] = args[0]

        def behind(module: nn.Module, args: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
            share, x = self.share, self._inputs.pop(bond, None)
            if share <= 0 or x is None:
                return result
            node = chain.down.node
            bias = None if chain.up.bias is None else self.bound.tensor(chain.up.bias)
            dense = node.operator.evaluate(x, self.dense[bond], bias, **evaluate(dict(node.attributes), {}))
            mixed: torch.Tensor = share * dense + (1 - share) * result
            return mixed

        self._hooks += [owner.register_forward_pre_hook(before) for owner, _ in first]
        self._hooks += [owner.register_forward_hook(behind) for owner, _ in last]
        return True

    def _step(self) -> None:
        if self.steps <= self.learning:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def _finish(self) -> Graph:
        for hook in self._hooks:
            hook.remove()
        return super()._finish()

    def state_dict(self) -> dict[str, Any]:
        held = {bond.dim.name: weight.detach().clone() for bond, weight in self.dense.items()}
        return {**super().state_dict(), "dense": held, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            for bond, weight in self.dense.items():
                weight.copy_(state["dense"][bond.dim.name])
        self._optimizer.load_state_dict(state["optimizer"])
