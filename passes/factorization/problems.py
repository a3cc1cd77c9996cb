"""What the factors of one layer are to keep: its weight, and how much what each input and output does matters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from regauge.ir.cost import smallest_sizes
from regauge.ir.graph import Graph, Value
from regauge.ir.sizes.expressions import product
from regauge.passes.calibration.layers import Layer, matrices_of
from regauge.passes.factorization.bands import Bands
from regauge.passes.factorization.metric_svd import Factored, factored

_ROUNDING = 1e-25


@dataclass
class Problem:
    """A block of a layer [outputs, columns], in double precision; without data both metrics are plain.

    ``inputs`` [columns, columns] is the metric of its inputs, ``outputs`` [outputs, outputs] that of its outputs. Where
    there are ``bands`` errors are told by these, which the two come near to.
    """

    layer: Layer
    weight: torch.Tensor
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    bands: Bands = ()

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
        return _ROUNDING * self.error(torch.zeros_like(self.weight))

    def weighed(self, change: torch.Tensor) -> torch.Tensor:
        """A matrix [outputs, columns] times both metrics."""
        if self.bands:
            parts = (outputs @ change @ inputs for inputs, outputs in self.bands)
            return sum(parts, start=torch.zeros_like(change))
        change = change if self.inputs is None else change @ self.inputs
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
