"""The protocol of sparsifiers, and what all structured ones share.

    graph = regauge.capture(model, (images,))
    sparsifier = regauge.training.Hesso(model, graph, Target(macs=0.5), warmup=200, period_steps=50)
    for images, labels in loader:
        loss = criterion(model(images), labels) + sparsifier.loss()
        loss.backward()
        optimizer.step()
        sparsifier.step()       # before optimizer.zero_grad(): some methods read the gradients
        optimizer.zero_grad()
    small = sparsifier.finish() # a graph; small.to_torch() is trained on, small.to_onnx("small.onnx") written

``model`` is the user's own module, its parameters stay its own, under their names. With gradient accumulation
``step`` follows ``optimizer.step``, and ``loss`` is divided like the other. With a GradScaler ``step`` follows
``scaler.step``, which leaves gradients unscaled. A sparsifier that learns (thresholds, gates) has an Adam of its own
inside ``step``. A sparsifier is made when the module lies where it is trained, since its state does too.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.groups import Member
from regauge.ir.dims.resize import resize
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.base import Cut
from regauge.passes.report import recorded_cuts, reported
from regauge.passes.training.bound_model import BoundModel
from regauge.passes.training.places import (
    Factors,
    along_axis,
    contracted_axes,
    directions,
    laid_along,
    multiplied,
    sums_by_index,
)
from regauge.passes.training.target import Plan, Scope, Target


class Sparsifier(ABC):
    """Base of all; see the module docstring. ``left`` counts what stays as it is, by reason."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.graph = graph
        self.bound = BoundModel(model, graph)
        self.steps = 0  # how often step() was called
        self.left: Counter[str] = Counter()

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    @abstractmethod
    def last_step(self) -> int:
        """The step after which the target is reached and only weights are trained."""

    def loss(self) -> torch.Tensor:
        """The regularisation term of the loss; zero where the method has none."""
        return torch.zeros((), device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.bound.model.parameters()).device

    def step(self) -> None:
        """To be called after each ``optimizer.step()``."""
        self.steps += 1
        with torch.no_grad():
            self._step()

    @abstractmethod
    def _step(self) -> None: ...

    def finish(self) -> Graph:
        """The trained graph without what was removed; the hooks of the sparsifier come off the module.

        It computes what the module computes; its ``report`` says what each Dim lost, or how much of each weight is
        zero. Raises PassError before the target is reached.
        """
        if self.steps < self.last_step:
            raise PassError(
                f"{type(self).__name__} reaches its target at step {self.last_step} and is at {self.steps}: "
                "train on, or shorten its schedule"
            )
        since = time.perf_counter()
        with torch.no_grad():
            result = self._finish()
        return reported(self.graph, result, self.name, since, self._cuts(result), self.left)

    @abstractmethod
    def _finish(self) -> Graph: ...

    def _cuts(self, result: Graph) -> Iterable[Cut]:
        """What the report shows as lost."""
        return recorded_cuts(self.graph, result)

    def state_dict(self) -> dict[str, Any]:
        """All that a checkpoint needs beside those of the module and the optimizer."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another sparsifier, made with the same arguments, was."""
        self.steps = int(state["steps"])


class GroupSparsifier(Sparsifier):
    """A structured sparsifier: indices of Dims die, and with them their slices of every parameter that has the Dim."""

    scope: Scope = "uniform"  # where the target does not say

    def __init__(self, model: nn.Module, graph: Graph, target: Target) -> None:
        super().__init__(model, graph)
        groups = target.select(graph, self.left)
        self.plan = Plan(graph, groups, target, self.scope)
        self.dims = self.plan.dims
        self.alive = {dim: np.ones(int(dim.size), dtype=bool) for dim in self.dims}
        trained = set(self.bound.trained())
        read, pointing = contracted_axes(graph), directions(graph)
        self._members = {
            group.dim: [m for m in group.members if m.parameter in trained and m not in pointing] for group in groups
        }
        self._makers = {dim: _makers(members, read) for dim, members in self._members.items()}
        self._readers = {dim: [m for m in self._members[dim] if m in read] for dim in self.dims}

    # -- slices ------------------------------------------------------------------------------------------------------

    def sums(self, dim: Dim, tensors: Mapping[Parameter, torch.Tensor], members: list[Member]) -> torch.Tensor:
        """For each index of a Dim the sum of the entries that it owns in the members' tensors, [indices]."""
        parts = [
            sums_by_index(
                self.graph.axes.of[m.parameter][m.axis], along_axis(tensors[m.parameter].float(), m.axis), dim
            )
            for m in members
            if m.parameter in tensors
        ]
        return torch.stack(parts).sum(0) if parts else torch.zeros(int(dim.size), device=self._device)

    def squares(self, dim: Dim) -> torch.Tensor:
        """The squared norm of each index over the slices that make it, [indices]."""
        members = self._makers[dim]
        return self.sums(dim, {m.parameter: self.bound.tensor(m.parameter).float().square() for m in members}, members)

    def along(self, factors: Factors, members: Mapping[Dim, list[Member]]) -> dict[Parameter, dict[int, torch.Tensor]]:
        """The vectors by which the members' axes are multiplied to give each index its factor."""
        wanted: dict[Member, dict[Dim, torch.Tensor]] = {}
        for dim, factor in factors.items():
            for member in members[dim]:
                wanted.setdefault(member, {})[dim] = factor
        found: dict[Parameter, dict[int, torch.Tensor]] = {}
        for member, own in wanted.items():
            vector = laid_along(self.graph.axes.of[member.parameter][member.axis], own)
            if vector is not None:
                found.setdefault(member.parameter, {})[member.axis] = vector
        return found

    def scale(self, factors: Factors, members: Mapping[Dim, list[Member]]) -> None:
        """Multiply slices of the module's own parameters in place."""
        for parameter, axes in self.along(factors, members).items():
            tensor = self.bound.tensor(parameter)
            tensor.copy_(multiplied(tensor, axes))

    def silence(self) -> None:
        """Set every slice of every dead index to zero."""
        dead = {d: torch.as_tensor(a, device=self._device).float() for d, a in self.alive.items() if not a.all()}
        if dead:
            self.scale(dead, self._members)

    # -- protocol ----------------------------------------------------------------------------------------------------

    @property
    def sparsity(self) -> float:
        """The share of the indices that are dead."""
        return 1 - sum(int(a.sum()) for a in self.alive.values()) / sum(len(a) for a in self.alive.values())

    def _finish(self) -> Graph:
        self.silence()
        result = self.bound.trained_graph(self.name)
        keep = {dim.name: np.flatnonzero(alive) for dim, alive in self.alive.items() if not alive.all()}
        return resize(result, keep, by=self.name) if keep else result

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "alive": _by_name(self.alive)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.alive = self._by_dim(state["alive"])

    def _by_dim(self, given: Mapping[str, torch.Tensor]) -> dict[Dim, np.ndarray]:
        missing = {dim.name for dim in self.dims} ^ set(given)
        if missing:
            raise PassError(f"the state is that of another graph: {min(missing)} is only in one of them")
        return {dim: given[dim.name].cpu().numpy().copy() for dim in self.dims}


def _by_name(given: Mapping[Dim, np.ndarray]) -> dict[str, torch.Tensor]:
    return {dim.name: torch.from_numpy(values.copy()) for dim, values in given.items()}


def _makers(members: list[Member], read: set[Member]) -> list[Member]:
    """The members that make the indices rather than read them; all of them where none does."""
    return [member for member in members if member not in read] or members
