"""HESSO and CRIC: redundant indices are chosen by several measures together and go to exact zero step by step.

Chen et al. 2024, HESSO: Towards Automatic Efficient and User Friendly Any Neural Network Training and Pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from regauge.ir.dims.extents import Dim
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.training.sparsifier import GroupSparsifier
from regauge.passes.training.target import Scope, Target

_SMALL = 1e-8
_PROJECTED = (0.25, 0.5, 0.75)  # shares of a Dim that are zero where the loss is measured


class Hesso(GroupSparsifier):
    """Warm up, then in each of ``periods`` decay a share of the redundant indices to zero; train the rest on.

    At the start of a period the indices of all Dims are ranked by saliency (:meth:`saliency`), and those that have to
    go by its end are redundant. For t = 0..T-1, T = ``period_steps``, the optimizer steps as ever and the slices of
    redundant indices are then multiplied by (T - t - 1) / (T - t): a linear decay that ends at exact zero (as in the
    paper and the authors' code). From then on they are held at zero, whatever momentum does.

    Deviations: the optimizer is the user's own, so the gradients in the saliency are those that lie in ``.grad`` and
    are read after its step, where the authors' code takes the direction of its own optimizer (momentum included) before
    the step; its first factor is that of t = 1; a budget in MACs or parameters may be given in place of
    a share of groups; where a group has weights that only read its indices, these take no part in saliency and decay,
    and become zero when the others have.
    """

    scope: Scope = "global"

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        target: Target,
        *,
        warmup: int = 0,
        periods: int = 5,
        period_steps: int = 20,
    ) -> None:
        if warmup < 0 or periods < 1 or period_steps < 1:
            raise PassError("Hesso has warmup >= 0, periods >= 1 and period_steps >= 1")
        super().__init__(model, graph, target)
        self.warmup, self.periods, self.period_steps = warmup, periods, period_steps
        self.redundant = {dim: np.zeros(int(dim.size), dtype=bool) for dim in self.dims}

    @property
    def last_step(self) -> int:
        return self.warmup + self.periods * self.period_steps

    @torch.no_grad()
    def saliency(self) -> dict[Dim, np.ndarray]:
        """The mean of five measures, each divided by its norm over all indices of all Dims.

        With x the entries of an index and g their gradients: |x|, |x| / number of entries, 1 + cos(x, g), |x'g| and
        (x'g)^2 / 2. All count for an index, the cosine with the sign that the authors' code gives it.
        """
        tensors = {m.parameter: self.bound.tensor(m.parameter) for dim in self.dims for m in self._makers[dim]}
        if all(tensor.grad is None for tensor in tensors.values()):
            raise PassError("Hesso reads gradients: call step() after optimizer.step() and before zero_grad()")
        squares = {p: t.float().square() for p, t in tensors.items()}
        slopes = {p: t.grad.float().square() for p, t in tensors.items() if t.grad is not None}
        products = {p: t.float() * t.grad.float() for p, t in tensors.items() if t.grad is not None}
        ones = {p: torch.ones_like(t) for p, t in tensors.items()}
        measures: list[dict[Dim, torch.Tensor]] = [{} for _ in range(5)]
        for dim in self.dims:
            members = self._makers[dim]
            size, slope, product, count = (self.sums(dim, t, members) for t in (squares, slopes, products, ones))
            size, slope = size.sqrt(), slope.sqrt()
            cosine = 1 + product / (size + _SMALL) / (slope + _SMALL)
            found = (size, size / count.clamp(min=1), cosine, product.abs(), product.square() / 2)
            for measure, values in zip(measures, found, strict=True):
                measure[dim] = values
        return {dim: values.cpu().double().numpy() for dim, values in _mean_of_unit_vectors(measures).items()}

    def _step(self) -> None:
        place = self.steps - self.warmup - 1  # steps since the warm-up
        if 0 <= place < self.periods * self.period_steps:
            period, time = divmod(place, self.period_steps)
            if time == 0:
                self._choose((period + 1) / self.periods)
            self._decay(time)
        self.silence()

    def _choose(self, progress: float) -> None:
        kept = self.plan.survivors(self.saliency(), self.alive, progress)
        self.redundant = {dim: self.alive[dim] & ~kept[dim] for dim in self.dims}

    def _decay(self, time: int) -> None:
        """One step of the decay of what is redundant; at the last one it is dead."""
        factor = (self.period_steps - time - 1) / (self.period_steps - time)
        factors = {
            dim: torch.where(torch.as_tensor(goes, device=self._device), factor, 1.0)
            for dim, goes in self.redundant.items()
            if goes.any()
        }
        if factors:
            self.scale(factors, self._makers)
        if time == self.period_steps - 1:
            self.alive = {dim: self.alive[dim] & ~self.redundant[dim] for dim in self.dims}

    def state_dict(self) -> dict[str, Any]:
        redundant = {dim.name: torch.from_numpy(goes.copy()) for dim, goes in self.redundant.items()}
        return {**super().state_dict(), "redundant": redundant}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.redundant = self._by_dim(state["redundant"])


def _mean_of_unit_vectors(measures: list[dict[Dim, torch.Tensor]]) -> dict[Dim, torch.Tensor]:
    found: dict[Dim, torch.Tensor] = {}
    for measure in measures:
        norm = torch.stack([values.square().sum() for values in measure.values()]).sum().sqrt() + _SMALL
        for dim, values in measure.items():
            found[dim] = found.get(dim, torch.zeros_like(values)) + values / norm / len(measures)
    return found


class Cric(Hesso):
    """HESSO whose redundant indices are first put to the test: the corrective redundancy identification cycle.

    After the warm-up, in cycles of ``sampling_steps``: what ranks lowest is the violating set, and goes towards zero
    along a linear path while training goes on and the saliency of every index is added up; then all weights are as they
    were before the cycle. Whatever was among the lowest at some step of a cycle and was not tested before is the next
    violating set, until it is no more than ``tolerance`` of all that has to go, or ``cycles`` are over. The mean over
    all cycles decides what is redundant, and decays in one period (as the authors' code has it).

    With ``measure_loss``, which gives the loss of the module as it is on a batch of one's own, each Dim is projected
    before the first cycle: the lowest 25, 50 and 75 % of its indices are zero in turn, the loss is measured and divided
    by that of the whole, and the mean of the three over the size of the Dim is added to the score of every index of it
    (the authors' code). So Dims without which the loss rises keep more.

    Deviations: the optimizer's own state (momentum) is not put back with the weights. The loss is measured on one batch
    for all, where the code takes whichever the training loop is at, with a step in between; saliency is not sampled
    meanwhile. ``tolerance`` is a share, where the code counts groups and stops at none.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        target: Target,
        *,
        warmup: int = 0,
        period_steps: int = 100,
        sampling_steps: int = 10,
        cycles: int = 10,
        tolerance: float = 0.05,
        measure_loss: Callable[[], torch.Tensor | float] | None = None,
    ) -> None:
        if sampling_steps < 1 or cycles < 1:
            raise PassError("Cric has sampling_steps >= 1 and cycles >= 1")
        super().__init__(model, graph, target, warmup=warmup, periods=1, period_steps=period_steps)
        self.sampling_steps, self.cycles, self.tolerance = sampling_steps, cycles, tolerance
        self.measure_loss = measure_loss
        self.cycle, self._time, self._ended_at = 0, 0, -1
        self._tested, self._trial = ({dim: np.zeros(int(dim.size), dtype=bool) for dim in self.dims} for _ in range(2))
        self._sums = {dim: np.zeros(int(dim.size)) for dim in self.dims}  # of saliencies, over all cycles
        self._losses = {dim: np.zeros(int(dim.size)) for dim in self.dims}  # what measured losses add to the score
        self._before: dict[Parameter, torch.Tensor] = {}

    @property
    def last_step(self) -> int:
        """The step at which the decay ends; while the cycles still run, the latest that it can be."""
        ended = self._ended_at if self._ended_at >= 0 else self.warmup + self.cycles * self.sampling_steps
        return ended + self.period_steps

    def scores(self) -> dict[Dim, np.ndarray]:
        """The redundancy scores of each Dim's indices: their mean saliency, plus a term of the losses seen."""
        samples = max(1, self.cycle * self.sampling_steps + self._time)
        return {dim: self._sums[dim] / samples + self._losses[dim] for dim in self.dims}

    def _step(self) -> None:
        if self._ended_at >= 0:
            time = self.steps - self._ended_at - 1
            if time == 0:
                self.redundant = self._lowest(self.scores())
            if time < self.period_steps:
                self._decay(time)
            self.silence()
        elif self.steps > self.warmup:
            self._sample()

    def _sample(self) -> None:
        saliency = self.saliency()
        if self.cycle == 0 and self._time == 0:
            self.redundant = self._lowest(saliency)
            if self.measure_loss is not None:
                self._losses = self._projected_losses(saliency, self.measure_loss)
        if self._time == 0:
            self._begin_cycle()
        factor = (self.sampling_steps - self._time - 1) / (self.sampling_steps - self._time)
        violating = {d: torch.as_tensor(v, device=self._device) for d, v in self.redundant.items() if v.any()}
        if violating:
            self.scale({d: torch.where(v, factor, 1.0) for d, v in violating.items()}, self._makers)
        lowest = self._lowest(saliency)
        for dim in self.dims:
            self._sums[dim] = self._sums[dim] + saliency[dim]
            self._trial[dim] = (self._trial[dim] | lowest[dim]) & ~self._tested[dim]
        self._time += 1
        if self._time == self.sampling_steps:
            self._end_cycle()

    def _projected_losses(
        self, saliency: Mapping[Dim, np.ndarray], measure_loss: Callable[[], torch.Tensor | float]
    ) -> dict[Dim, np.ndarray]:
        """For each Dim the mean ratio of losses without shares of its indices and with all, over its size."""
        tensors = [*self.bound.model.parameters(), *self.bound.model.buffers()]  # batch norms in training move the last
        held = [tensor.clone() for tensor in tensors]
        whole = float(measure_loss())
        if whole <= 0:
            raise PassError(f"measure_loss gave {whole:g}: ratios are of losses above 0")
        found = {}
        for dim, values in saliency.items():
            ratios = []
            for share in _PROJECTED:
                lowest = np.argsort(values, kind="stable")[: max(1, int(share * len(values)))]
                factor = torch.ones(len(values), device=self._device)
                factor[lowest] = 0
                self.scale({dim: factor}, self._makers)
                ratios.append(float(measure_loss()) / whole)
                for tensor, before in zip(tensors, held, strict=True):
                    tensor.copy_(before)
            found[dim] = np.full(len(values), np.mean(ratios) / len(values))
        return found

    def _begin_cycle(self) -> None:
        for dim in self.dims:
            self._tested[dim] = self._tested[dim] | self.redundant[dim]
            self._trial[dim] = np.zeros(int(dim.size), dtype=bool)
        self._before = {p: self.bound.tensor(p).clone() for p in self.bound.trained()}

    def _lowest(self, scores: Mapping[Dim, np.ndarray]) -> dict[Dim, np.ndarray]:
        kept = self.plan.survivors(scores, self.alive, 1.0)
        return {dim: ~kept[dim] for dim in self.dims}

    def _end_cycle(self) -> None:
        for parameter, tensor in self._before.items():
            self.bound.tensor(parameter).copy_(tensor)
        self._before = {}
        goes = sum(int(v.sum()) for v in self._lowest(self.scores()).values())
        self.redundant = {dim: trial.copy() for dim, trial in self._trial.items()}
        self._time, self.cycle = 0, self.cycle + 1
        new = sum(int(v.sum()) for v in self.redundant.values())
        if new <= self.tolerance * goes or self.cycle == self.cycles:
            self._ended_at = self.steps

    def state_dict(self) -> dict[str, Any]:
        arrays = {"tested": self._tested, "trial": self._trial, "sums": self._sums, "losses": self._losses}
        return {
            **super().state_dict(),
            "cycle": (self.cycle, self._time, self._ended_at),
            "before": {p.name: tensor.clone() for p, tensor in self._before.items()},
            **{n: {d.name: torch.from_numpy(v.copy()) for d, v in found.items()} for n, found in arrays.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.cycle, self._time, self._ended_at = state["cycle"]
        names = ("tested", "trial", "sums", "losses")
        self._tested, self._trial, self._sums, self._losses = (self._by_dim(state[n]) for n in names)
        named = {p.name: p for p in self.bound.trained()}
        self._before = {named[name]: tensor.clone() for name, tensor in state["before"].items()}
