"""AWQ (Lin et al. 2024, Activation-aware Weight Quantization): scales, and then clipping, for weights stored alone.

s_j = mean|x_j|^a, divided by the root of its greatest times its least entry, for a = 0, 0.05, ... 1: that which loses
least of what all layers give that read x, |x W' - (x / s) Q(W s)'|^2. Then the range of each group of weights is cut
by up to a half in steps, as far as that loses less of the same. Both errors are quadratic forms with the Gram matrix
X'X; clipping looks at each group by itself, as if no other were rounded (as the paper's code does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.statistics import Collector, Gram
from regauge.passes.quantization.grid import Grid
from regauge.passes.quantization.smoothing import Room, Smoothing

EXPONENTS = tuple(step / 20 for step in range(21))
SHRINKS = tuple(1 - step / 40 for step in range(1, 21))


class Magnitude(Collector):
    """The mean magnitude of each index of an axis; holds a number for each."""

    def add(self, x: torch.Tensor) -> None:
        rows = self.rows(x)
        self.plus("sum", rows.abs().sum(0))
        self.plus("rows", torch.tensor(float(len(rows)), dtype=torch.float64))

    @property
    def mean(self) -> torch.Tensor:
        return self.state["sum"] / self.state["rows"]


@dataclass
class Read:
    """What is known of a value whose readers' weights are rounded."""

    layers: Sequence[Layer]
    magnitude: Magnitude
    gram: Gram
    grid: Grid
    group: int  # neighbouring columns with one scale

    @property
    def products(self) -> torch.Tensor:
        """X'X, [channels, channels]."""
        return self.gram.gram[:-1, :-1]

    def loss(self, scale: torch.Tensor) -> float:
        total = 0.0
        for layer in self.layers:
            weight = _matrix(layer)
            apart = rounded_in_groups(weight * scale, self.grid, self.group) / scale - weight
            total += float(((apart @ self.products) * apart).sum())
        return total

    def scales(self, exponent: float, room: Room) -> torch.Tensor:
        size = room.greatest(self.magnitude.mean).clamp(min=1e-5).pow(exponent)
        return room.spread(size / (size.amax() * size.amin()).sqrt())

    def best(self, room: Room) -> Smoothing:
        base = max(self.loss(torch.ones_like(self.magnitude.mean)), 1e-300)
        tried = [(self.loss(scale), scale) for e in EXPONENTS[1:] for scale in (self.scales(e, room),)]
        least, scale = min(tried, key=lambda pair: pair[0])
        return Smoothing(scale, torch.zeros_like(scale), least / base)


def clipped(layer: Layer, grid: Grid, group: int, products: torch.Tensor) -> torch.Tensor:
    """The weight [outputs, columns] of a layer with each group cut off where that loses least on X'X."""
    weight = _matrix(layer)
    rows, columns = weight.shape
    parts = weight.reshape(rows, columns // group, group)
    blocks = torch.stack([products[g : g + group, g : g + group] for g in range(0, columns, group)])

    def losses(candidate: torch.Tensor) -> torch.Tensor:
        apart = rounded_in_groups(candidate.reshape(rows, columns), grid, group).reshape(parts.shape) - parts
        return torch.einsum("rgi,gij,rgj->rg", apart, blocks, apart)

    reach, best, least = parts.abs().amax(2, keepdim=True), parts, losses(parts)
    for shrink in SHRINKS:
        candidate = torch.clamp(parts, -reach * shrink, reach * shrink)
        found = losses(candidate)
        best = torch.where((found < least)[..., None], candidate, best)
        least = torch.minimum(found, least)
    return best.reshape(rows, columns)


def rounded_in_groups(weight: torch.Tensor, grid: Grid, group: int) -> torch.Tensor:
    """[rows, columns] rounded over the whole range of each group of columns."""
    parts = weight.reshape(len(weight), -1, group)
    scale, zero = grid.span(parts.amin(2, keepdim=True), parts.amax(2, keepdim=True))
    return ((grid.codes(parts, scale, zero) - zero) * scale).reshape(weight.shape)


def _matrix(layer: Layer) -> torch.Tensor:
    return layer.matrix(layer.weight.tensor.detach()).double()
