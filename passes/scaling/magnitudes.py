"""How large the entries of tensors are: of weights, and of values on data."""

from __future__ import annotations

import torch

from regauge.ir.dtypes import widened
from regauge.passes.calibration.statistics import Collector
from regauge.passes.scaling.factors import exponent_below

_HUGE = 2.0**100  # and beyond stands for infinity, as in masks


class Magnitudes(Collector):
    """The greatest magnitude, the mean of the magnitudes and the mean square of a value; holds four numbers.

    Infinite entries and those that stand for infinity are left out.
    """

    def add(self, x: torch.Tensor) -> None:
        sizes = widened(x.detach().abs().reshape(-1))
        if len(sizes) and not bool(sizes.max() < _HUGE):
            sizes = sizes[sizes < _HUGE]
        if len(sizes):
            greatest = sizes.max().double()
            self.state["greatest"] = torch.maximum(self.state.get("greatest", greatest), greatest)
            self.plus("count", torch.tensor(float(len(sizes)), dtype=torch.float64))
            self.plus("sum", sizes.sum(dtype=torch.float64))
            self.plus("squares", torch.linalg.vector_norm(sizes, dtype=torch.float64).square())

    def norm(self, kind: str) -> float:
        """The norm ``max``, ``l1`` (the mean of the magnitudes) or ``l2`` (the root of the mean square)."""
        if not self.state:
            return 0.0
        count = self.state["count"]
        found = {"max": self.state["greatest"], "l1": self.state["sum"] / count}
        return float(found[kind] if kind in found else (self.state["squares"] / count).sqrt())

    def exponent(self, kind: str) -> int | None:
        """Of the greatest power of two below a norm; None for what is zero, which may have any scale."""
        norm = self.norm(kind)
        return exponent_below(norm) if norm > 0 else None


def magnitudes_of(tensor: torch.Tensor) -> Magnitudes:
    """Those of a weight."""
    found = Magnitudes()
    found.add(tensor)
    return found
