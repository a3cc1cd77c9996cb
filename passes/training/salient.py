"""Weights frozen at their codes, the most salient first, while the others go on training and make up for it.

In each round a share of a layer's weights goes to its codes for good and the rest is trained on (Zhou et al. 2017,
Incremental Network Quantization, section 3.2, whose codes are powers of two and whose measure is |w|). Saliency is
w^2 times the mean of the squared gradient, the diagonal of the empirical Fisher information: what the loss is expected
to lose with the weight (LeCun et al. 1990, Optimal Brain Damage). Cao and Aref 2025 (Enhancing Ultra-Low-Bit
Quantization Through Saliency-Aware Partial Retraining) keep salient weights near their codes by a term in the loss, and
train scales and adapters beside weights that stay; here salient weights are held, scales stay, and the rest is trained.

Weights that are still trained are rounded in the forward pass, too, as all are by fake quantization: the paper's are
floats until their round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regauge.ir.errors import PassError
from regauge.ir.graph import Parameter
from regauge.passes.training.bound_model import BoundModel
from regauge.passes.training.fake_quantized import TrainedGrids
from regauge.passes.training.weight_masks import largest


class Salient:
    """Which weights are frozen, and where; ``squares`` are sums of squared gradients since the last round."""

    def __init__(self, weights: Sequence[Parameter], bound: BoundModel, grids: TrainedGrids) -> None:
        self.weights, self._bound, self._grids = weights, bound, grids
        self.squares = {weight: torch.zeros_like(bound.tensor(weight)) for weight in weights}
        self.frozen = {weight: torch.zeros_like(square, dtype=torch.bool) for weight, square in self.squares.items()}
        self.values = {weight: torch.zeros_like(square) for weight, square in self.squares.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Add the gradients of a step, and put frozen weights back."""
        for weight in self.weights:
            tensor = self._bound.tensor(weight)
            if tensor.grad is not None and bool(
                tensor.grad.isfinite().all()
            ):  # scalers of losses leave other steps out
                self.squares[weight] += tensor.grad.square()
            tensor.copy_(torch.where(self.frozen[weight], self.values[weight], tensor))

    @torch.no_grad()
    def freeze(self, share: float) -> None:
        """Freeze the most salient ones, those that are frozen included, up to a share of each weight."""
        if not 0 < share <= 1:
            raise PassError(f"share={share:g} is out of range: write a share of the weights above 0, at most 1")
        if share < 1 and not any(bool(square.any()) for square in self.squares.values()):
            raise PassError(
                "Qat: no gradient was seen since the last round, and none says which weights are salient: train first, "
                "and call step() between optimizer.step() and optimizer.zero_grad()"
            )
        for weight in self.weights:
            tensor, before = self._bound.tensor(weight), self.frozen[weight]
            count = round(share * tensor.numel())
            saliency = (tensor.square() * self.squares[weight]).masked_fill(before, torch.inf)
            now = before | largest(saliency, count) if count > int(before.sum()) else before
            codes = self._grids.rounded(weight.name)
            self.values[weight] = torch.where(before, self.values[weight], codes)
            self.frozen[weight] = now
            tensor.copy_(torch.where(now, self.values[weight], tensor))
            self.squares[weight].zero_()

    def state_dict(self) -> dict[str, Any]:
        parts = {"squares": self.squares, "frozen": self.frozen, "values": self.values}
        return {name: {weight.name: part[weight].clone() for weight in self.weights} for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in (("squares", self.squares), ("frozen", self.frozen), ("values", self.values)):
            for weight in self.weights:
                part[weight] = state[name][weight.name].to(part[weight].device).clone()
