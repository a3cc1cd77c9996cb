"""What the factors of one layer are to keep: its weight, and how much what each input and output does matters."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from regauge.ir.cost import smallest_sizes
from regauge.ir.graph import Graph, Value
from regauge.ir.sizes.expressions import product
from regauge.passes.calibration.layers import Layer, matrices_of
from regauge.passes.factorization.bands import Bands
from regauge.passes.factorization.grams import Gram
from regauge.passes.factorization.metric_svd import Factored, factored

ROUNDING = 1e-25  # share of the error without any weight, up to which there is nothing to better


@dataclass
class Problem:
    """A block of a layer [outputs, columns], in double precision; without data both metrics are plain.

    ``inputs`` [columns, columns] is the metric of its inputs, ``outputs`` [outputs, outputs] that of its outputs. Where
    there are ``bands`` errors are told by these, which the two come near to. ``few`` is the metric of inputs by its
    rows, where these are fewer than the columns: those of the bands, where there are any, one after the other.
    """

    layer: Layer
    weight: torch.Tensor
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    bands: Bands = ()
    few: Gram | None = None
    behind: dict[tuple[tuple[int, ...], int], float] = field(default_factory=dict, init=False, repr=False)
    """What is lost behind first links, by the axes that they contract and their ranks, as far as it was found."""

    @property
    def metric(self) -> Gram:
        """That of inputs; the plain one where nothing is known of them."""
        if self.few is not None:
            return self.few
        return Gram.plain(self.weight.shape[1]) if self.inputs is None else Gram.of(self.inputs)

    @cached_property
    def factored(self) -> Factored:
        """The best factors of the matrix."""
        return factored(self.weight, self.inputs, self.outputs)

    @property
    def scale(self) -> float:
        """By which errors are divided: without data layers are compared by their shares of themselves."""
        if self.inputs is not None:
            return 1.0
        return max(float(self.weight.square().sum()), 1e-300)

    @cached_property
    def carried(self) -> float:
        """What is lost without any weight; where errors of bands and of both metrics differ in it, the less."""
        return min(self.error(torch.zeros_like(self.weight)), float(self.factored.tail[0]) / self.scale)

    @cached_property
    def rounding(self) -> float:
        """Errors up to this are nothing that turns could better: a share of that without any weight."""
        return ROUNDING * self.error(torch.zeros_like(self.weight))

    def weighed(self, change: torch.Tensor) -> torch.Tensor:
        """A matrix [outputs, columns] times both metrics."""
        if self.bands:
            parts = (inputs.weighed(change[..., None], outputs)[..., 0] for inputs, outputs in self.bands)
            return sum(parts, start=torch.zeros_like(change))
        change = change if self.inputs is None else self.metric.weighed(change[..., None])[..., 0]
        return change if self.outputs is None else self.outputs @ change

    def error(self, weight: torch.Tensor) -> float:
        """What another weight in place of this one loses."""
        off = self.weight - weight
        return float((self.weighed(off) * off).sum()) / self.scale


def plain_problems(layer: Layer) -> list[Problem]:
    """Of each block, where nothing is known but its weight."""
    return [Problem(layer, weight) for weight in matrices_of(layer)]


def places(graph: Graph, value: Value, channels: int) -> int:
    """How many vectors of channels a value holds, for the smallest dynamic sizes; ``channels`` is their axis."""
    bound = smallest_sizes(graph)
    return int(product(bound(size) for axis, size in enumerate(value.shape) if axis != channels % value.rank))
