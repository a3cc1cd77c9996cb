"""Gradual pruning by magnitude, on a cubic schedule (Zhu and Gupta 2017): of Dims, of single weights, and N:M."""

from __future__ import annotations

import torch
from torch import nn

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.nm_mask import nm_mask
from regauge.passes.training.schedules import cubic
from regauge.passes.training.sparsifier import GroupSparsifier
from regauge.passes.training.target import Target
from regauge.passes.training.weight_masks import WeightSparsifier, largest


class _Refresh:
    """When masks are made anew: ``updates`` times, ``every`` so many steps, from ``begin`` on."""

    def __init__(self, begin: int, every: int, updates: int) -> None:
        if begin < 0 or every < 1 or updates < 1:
            raise PassError("a gradual schedule has begin >= 0, every >= 1 and updates >= 1")
        self.begin, self.every, self.updates = begin, every, updates

    @property
    def last(self) -> int:
        return self.begin + self.every * self.updates

    def progress(self, step: int) -> float | None:
        """The share of the final sparsity that is due at a step; None where nothing is due."""
        if not self.begin <= step <= self.last or (step - self.begin) % self.every:
            return None
        return cubic((step - self.begin) / (self.every * self.updates))


class GradualGroups(GroupSparsifier):
    """Indices of Dims die by the norm of the slices that make them, along the cubic schedule.

    At the steps ``begin + k every``, k = 0..updates, the share 1 - (1 - k / updates)^3 of the target is reached
    (Zhu and Gupta 2017, eq. 1, there for single weights). Norms are divided by their mean over the Dim. Deviation: an
    index that died stays dead, where the paper's masks are drawn anew from weights that are kept.
    """

    def __init__(
        self, model: nn.Module, graph: Graph, target: Target, *, begin: int = 0, every: int = 100, updates: int = 10
    ) -> None:
        super().__init__(model, graph, target)
        self.refresh = _Refresh(begin, every, updates)

    @property
    def last_step(self) -> int:
        return self.refresh.last

    def _step(self) -> None:
        progress = self.refresh.progress(self.steps)
        if progress is not None:
            norms = {dim: self.squares(dim).sqrt() for dim in self.dims}
            scores = {dim: (n / n.mean().clamp(min=1e-12)).cpu().double().numpy() for dim, n in norms.items()}
            self.alive = self.plan.survivors(scores, self.alive, progress)
        self.silence()


class GradualWeights(WeightSparsifier):
    """Single weights become zero by magnitude, layer by layer, along the cubic schedule; sizes stay.

    ``sparsity`` is the share of each weight's entries that are zero at the end. With ``pattern=(n, m)`` instead, of
    every m entries along the contracted axis m - 1, m - 2 and at the end n are kept, as the schedule has it.
    Deviation from Zhu and Gupta 2017: a weight that became zero stays zero, where theirs keep their values unseen.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        sparsity: float | None = None,
        *,
        pattern: tuple[int, int] | None = None,
        begin: int = 0,
        every: int = 100,
        updates: int = 10,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> None:
        if (sparsity is None) == (pattern is None):
            raise PassError("GradualWeights takes either a sparsity or a pattern: sparsity=0.8 or pattern=(2, 4)")
        if sparsity is not None and not 0 <= sparsity < 1:
            raise PassError(f"sparsity={sparsity:g} is out of range: write a share of 0 or more and below 1")
        super().__init__(model, graph, pattern=pattern, include=include, exclude=exclude)
        self.final = sparsity
        self.refresh = _Refresh(begin, every, updates)

    @property
    def last_step(self) -> int:
        return self.refresh.last

    def _step(self) -> None:
        progress = self.refresh.progress(self.steps)
        if progress is not None:
            for parameter in self.axes:
                self.masks[parameter] &= self._mask(parameter, progress)
        self.apply()

    def _mask(self, parameter: Parameter, progress: float) -> torch.Tensor:
        size = self.bound.tensor(parameter).float().abs().where(self.masks[parameter], -1.0)
        if self.pattern is None:
            assert self.final is not None
            return largest(size, round((1 - self.final * progress) * size.numel()))
        n, m = self.pattern
        return nm_mask(size, self.axes[parameter], m - round(progress * (m - n)), m)
