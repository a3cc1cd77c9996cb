"""Structured sparsifiers that learn what goes: gates on Dims, trained beside the weights, then fixed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from regauge.ir.dims.extents import Dim, resolve
from regauge.ir.dims.groups import Member
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.training.bound_model import ForwardWeights
from regauge.passes.training.places import multiplied
from regauge.passes.training.size_share import SizeShare
from regauge.passes.training.sparsifier import GroupSparsifier
from regauge.passes.training.target import Scope, Target


class LearnedSparsifier(GroupSparsifier):
    """For ``learning`` steps gates are trained; then the target is met exactly, by :meth:`ranking`, and weights go on.

    While gates are learnt they multiply weights in the forward pass only: of each index the weights that read it, or
    where none does those that make it. ``learned`` are the parameters of the gates, trained by an Adam of their own at
    ``rate`` inside :meth:`step`; a step whose gradients are not finite, as under loss scaling, is left out.
    """

    scope: Scope = "global"

    def __init__(self, model: nn.Module, graph: Graph, target: Target, *, learning: int, rate: float) -> None:
        if learning < 1 or rate <= 0:
            raise PassError(f"{type(self).__name__} has learning >= 1 steps and a rate above 0")
        super().__init__(model, graph, target)
        self.learning = learning
        self.share = SizeShare(graph, self.dims, target)
        self.gated = {dim: self._readers[dim] or self._makers[dim] for dim in self.dims}
        self.learned: dict[str, nn.Parameter] = {}
        self.fixed = False
        self._make_learned()
        self._optimizer = torch.optim.Adam(self.learned.values(), lr=rate)
        self._forward = ForwardWeights(self.bound, self._weights)

    @property
    def last_step(self) -> int:
        return self.learning

    def _learn(self, name: str, values: torch.Tensor) -> nn.Parameter:
        """A new learned parameter."""
        self.learned[name] = nn.Parameter(values.detach().clone().to(self._device))
        return self.learned[name]

    def making_layers(self) -> dict[Dim, list[Layer]]:
        """For each Dim the linear maps and convolutions whose output it alone is."""
        makers = {dim: set(self._makers[dim]) for dim in self.dims}
        found: dict[Dim, list[Layer]] = {dim: [] for dim in self.dims}
        for layer in filter(None, map(layer_of, self.graph.nodes)):
            made = resolve(self.graph.axes.of[layer.weight][layer.made])
            if isinstance(made, Dim) and Member(layer.weight, layer.made) in makers.get(made, ()):
                found[made].append(layer)
        return found

    @abstractmethod
    def _make_learned(self) -> None: ...

    @abstractmethod
    def gates(self) -> dict[Dim, torch.Tensor]:
        """The gates of each Dim, one factor for each index, with gradients to the learned parameters."""

    @abstractmethod
    def ranking(self) -> dict[Dim, np.ndarray]:
        """The final importance scores of each Dim's indices: the lowest are removed first."""

    def _weights(self) -> dict[Parameter, torch.Tensor]:
        along = self.along(self.gates(), self.gated)
        return {p: multiplied(self.bound.tensor(p), axes) for p, axes in along.items()}

    def _step(self) -> None:
        if not self.fixed:
            gradients = [p.grad for p in self.learned.values() if p.grad is not None]
            if all(bool(gradient.isfinite().all()) for gradient in gradients):
                self._optimizer.step()
            self._optimizer.zero_grad()
        if not self.fixed and self.steps >= self.learning:
            self._fix()
        if self.fixed:
            self.silence()

    def _fix(self) -> None:
        """The gates are done: what ranks lowest dies, and the module has plain weights again."""
        self.alive = self.plan.survivors(self.ranking(), self.alive, 1.0)
        self._fold()
        self._forward.remove()
        self.fixed = True

    def _fold(self) -> None:
        """Put what gates do to living indices into the weights; nothing where they are 1."""

    def state_dict(self) -> dict[str, Any]:
        learned = {name: tensor.detach().clone() for name, tensor in self.learned.items()}
        return {
            **super().state_dict(),
            "fixed": self.fixed,
            "learned": learned,
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        with torch.no_grad():
            for name, tensor in self.learned.items():
                tensor.copy_(state["learned"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.fixed = bool(state["fixed"])
        if self.fixed:
            self._forward.remove()


def straight_through(soft: torch.Tensor, hard: torch.Tensor) -> torch.Tensor:
    """The value of ``hard`` with the gradient of ``soft``."""
    return hard.to(soft.dtype) + (soft - soft.detach())
