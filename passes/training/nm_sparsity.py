"""N:M sparsity learnt from dense weights: SR-STE, and masks that set in by and by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter
from regauge.passes.nm_mask import nm_mask
from regauge.passes.training.bound_model import ForwardWeights
from regauge.passes.training.schedules import decayed
from regauge.passes.training.weight_masks import WeightSparsifier

Recipe: TypeAlias = Literal["sr-ste", "ste", "linear", "exponential", "structure"]
_RECIPES = ("sr-ste", "ste", "linear", "exponential", "structure")


class NMSparsity(WeightSparsifier):
    """Of every m weights in a row along the contracted axis the n largest take part in the forward pass.

    Weights stay dense, and so does what the optimizer does to them; masks m are drawn from them at every pass until
    ``finish`` or ``freeze_at``. The recipes:

    - ``sr-ste``: w m forward, straight-through backward, and in :meth:`loss` the term whose gradient is
      ``penalty`` (1 - m) w: the update is w - lr (g(w m) + penalty (1 - m) w) (Zhou et al. 2021, Learning N:M
      Fine-grained Structured Sparse Neural Networks From Scratch); as a term of the loss it is right under
      gradient accumulation and loss scaling too.
    - ``ste``: the same without the term.
    - ``linear``, ``exponential``: w (m + b (1 - m)), b from 1 to 0 over ``steps``, gradients through the product
      (Bambhaniya et al. 2024, Progressive Gradient Flow for Robust N:M Sparsity Training, mask decay).
    - ``structure``: w m with m - 1 of m, m / 2, m / 4, ... n of m over ``steps``, in equal stages (the same, structure
      decay; the stages are those of the authors' code).

    The decays begin at ``begin``. From step ``freeze_at`` on masks stay: by default never with straight-through
    gradients, and once the decay is over with the others, since no gradient reaches a masked weight then.

    Deviations: the exponential decay is 0.01^t over its schedule with a last step to 0, however long it is. Of the
    decays, masked weights get the gradient of the product, which vanishes as the abstract of the paper has it; the
    authors' code passes it on whole.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        n: int = 2,
        m: int = 4,
        *,
        recipe: Recipe = "sr-ste",
        penalty: float = 2e-4,
        begin: int = 0,
        steps: int = 1000,
        freeze_at: int | None = None,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> None:
        if recipe not in _RECIPES:
            raise PassError(f"recipe={recipe!r} is unknown: write one of {', '.join(_RECIPES)}")
        super().__init__(model, graph, pattern=(n, m), include=include, exclude=exclude)
        self.recipe, self.penalty, self.begin, self.decay_steps = recipe, penalty, begin, steps
        self.freeze_at = freeze_at if freeze_at is not None or self._is_straight else begin + steps
        self._fixed = False
        self._forward = ForwardWeights(self.bound, self._weights_now)

    @property
    def _is_straight(self) -> bool:
        return self.recipe in ("sr-ste", "ste")

    @property
    def last_step(self) -> int:
        return 0 if self._is_straight else self.begin + self.decay_steps

    @property
    def time(self) -> float:
        """The share of the decay that is over."""
        return min(max((self.steps - self.begin) / max(1, self.decay_steps), 0.0), 1.0)

    def loss(self) -> torch.Tensor:
        """penalty / 2 times the squared norm of the masked weights, for ``sr-ste``."""
        total = super().loss()
        if self.recipe == "sr-ste":
            for parameter, mask in self._masks_now().items():
                total = total + (self.bound.tensor(parameter) * ~mask).float().square().sum()
        return total * (self.penalty / 2)

    def _masks_now(self) -> dict[Parameter, torch.Tensor]:
        if not self._fixed:
            n, m = self._pattern_now()
            with torch.no_grad():
                self.masks = {p: nm_mask(self.bound.tensor(p).abs(), axis, n, m) for p, axis in self.axes.items()}
        return self.masks

    def _pattern_now(self) -> tuple[int, int]:
        assert self.pattern is not None
        n, m = self.pattern
        if self.recipe != "structure" or self.time >= 1:
            return n, m
        if self.steps < self.begin:
            return m, m
        stages = [m - 1, *(kept for i in range(1, m.bit_length()) if n < (kept := m >> i) < m - 1), n]
        return stages[int(self.time * len(stages))], m

    def _weights_now(self) -> dict[Parameter, torch.Tensor]:
        masks = self._masks_now()
        found = {}
        for parameter, mask in masks.items():
            weight = self.bound.tensor(parameter)
            if self._is_straight:
                found[parameter] = weight + (weight * mask - weight).detach()
            elif self.recipe == "structure":
                found[parameter] = weight * mask
            else:
                kind: Literal["linear", "exponential"] = "linear" if self.recipe == "linear" else "exponential"
                found[parameter] = weight * (mask + decayed(self.time, kind) * ~mask)
        return found

    def _step(self) -> None:
        """Masks are drawn when the module runs; here they are only fixed."""
        if self.freeze_at is not None and self.steps >= self.freeze_at:
            self._masks_now()
            self._fixed = True

    def _finish(self) -> Graph:
        self._masks_now()
        self._forward.remove()
        return super()._finish()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "fixed": self._fixed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._fixed = bool(state["fixed"])
