"""Moving range from activations to weights, exactly: (x - c) / s and W s with bias b + W c give what x, W and b gave.

The scales are those of SmoothQuant (Xiao et al. 2023), the shift is that of Outlier Suppression+ (Wei et al. 2023):
half way between the ends of each channel. Rounding with step d leaves d^2 / 12, so of a layer y = x W' the error is

    d_x^2 / 12  sum_j s_j^2 |w_j|^2   +   sum_o d_o^2 / 12  sum_j E[x_j^2] / s_j^2

for each row, with d_x the step of x / s, and d_o that of row o of W s. SmoothQuant takes max|x_j|^a / max|w_j|^(1-a),
with one exponent a for all; here s starts there, with the best of a few, and follows the gradient of this error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from regauge.ir.gauge.frames import Frame
from regauge.ir.graph import Node, Value
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.statistics import Range, Spread
from regauge.passes.quantization.grid import Grid

EXPONENTS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_STEPS, _RATE = 60, 0.06  # of the descent, in logarithms of scales
_WORTH_A_SHIFT = 0.85  # of the error that is left: an addition more is worth it


@dataclass
class Readers:
    """A value, the layers that read it, and what its channels are like on data.

    ``beside`` are depthwise convolutions: whatever scale a channel has, its weights have as many steps.
    """

    value: Value
    layers: list[Layer]
    range: Range
    spread: Spread
    beside: list[Layer] = field(default_factory=list)
    chained: bool = False  # the value comes as integers: no node may stand in front of the layers

    @property
    def in_space(self) -> bool:
        """Whether convolutions read the value: its channels lie along axis 1."""
        return (self.layers or self.beside)[0].node.op == "conv"

    @property
    def clamp(self) -> Node | None:
        """The ReLU that gives the value: scales go through it to the layer in front, a shift does not."""
        producer = self.value.producer
        return producer if producer is not None and producer.op == "relu" else None


@dataclass
class Smoothing:
    """Scales and shift [channels] of a value, and the expected error as a share of that without them."""

    scale: torch.Tensor
    shift: torch.Tensor
    share: float


@dataclass
class Room:
    """Scales that the channels of a value may take with no node added: the number of each channel's, or -1 for none.

    ``moves`` say how they are inserted: a frame, the number of its scale for each channel, and the value's side of it.
    """

    numbers: torch.Tensor  # [channels]
    count: int
    moves: list[tuple[Frame, torch.Tensor, int]]

    def spread(self, scales: torch.Tensor) -> torch.Tensor:
        """[scales] as [channels]."""
        return torch.cat([scales, torch.ones(1, dtype=scales.dtype)])[self.numbers]

    def greatest(self, channels: torch.Tensor) -> torch.Tensor:
        """The greatest entry of the channels that share each scale."""
        found = torch.zeros(self.count + 1, dtype=channels.dtype)
        places = torch.where(self.numbers < 0, self.count, self.numbers)
        return found.scatter_reduce(0, places, channels, "amax")[:-1]


def whole_room(channels: int) -> Room:
    """A scale for each channel, wherever they go."""
    return Room(torch.arange(channels), channels, [])


def smoothing_of(
    readers: Readers, activations: Grid, weights: Grid, exponent: float | None = None, room: Room | None = None
) -> Smoothing:
    """The best scales, or those of an ``exponent`` without a shift; in a ``room`` those that it has, and no shift.

    What convolutions read is padded with zeros, and so cannot be shifted.
    """
    parts = [_by_channel(layer) for layer in readers.layers]
    beside = sum((_squares_by_channel(layer) for layer in readers.beside), torch.zeros(len(readers.range.lowest)))
    low, high, spread = readers.range.lowest, readers.range.highest, readers.spread
    room = room or whole_room(len(low))
    plain = _Error(low, high, spread.mean_square, parts, beside, activations, weights, room)
    zeros = torch.zeros_like(low)
    base = max(float(plain(plain.ones)), 1e-300)
    if exponent is not None:
        scale = plain.by_exponent(exponent)
        return Smoothing(room.spread(scale), zeros, float(plain(scale)) / base)
    found = Smoothing(room.spread(scale := plain.least()), zeros, float(plain(scale)) / base)
    biased = all(layer.bias is not None for layer in readers.layers)
    if biased and not room.moves and readers.clamp is None and not readers.in_space:
        middle = (low + high) / 2
        squares = spread.variance + (spread.mean - middle).square()
        shifted = _Error(low - middle, high - middle, squares, parts, beside, activations, weights, room)
        scale = shifted.least()
        share = float(shifted(scale)) / base
        if share < _WORTH_A_SHIFT * found.share:
            return Smoothing(scale, middle, share)
    return found


def best_exponent(readers: Readers, activations: Grid, weights: Grid, room: Room | None = None) -> Smoothing:
    """The scales of the exponent that loses least, as SmoothQuant has them."""
    tried = (smoothing_of(readers, activations, weights, exponent, room) for exponent in EXPONENTS)
    return min(tried, key=lambda found: found.share)


def _by_channel(layer: Layer) -> torch.Tensor:
    """Magnitudes of a weight, [outputs, channels, taps]."""
    matrix = layer.matrix(layer.weight.tensor.detach()).abs().float()
    return matrix.reshape(len(matrix), -1, layer.taps)


def _squares_by_channel(layer: Layer) -> torch.Tensor:
    """Of a depthwise convolution the squares of each channel's weights."""
    return layer.weight.tensor.detach().float().flatten(1).square().sum(1)


@dataclass
class _Error:
    """The expected error of the layers as a function of the scales of a room; see the module docstring."""

    low: torch.Tensor
    high: torch.Tensor
    squares: torch.Tensor
    parts: Sequence[torch.Tensor]  # magnitudes of weights, [outputs, channels, taps]
    beside: torch.Tensor  # squares of the weights of depthwise readers, [channels]
    activations: Grid
    weights: Grid
    room: Room

    @property
    def ones(self) -> torch.Tensor:
        return torch.ones(self.room.count, dtype=self.low.dtype)

    def __call__(self, scales: torch.Tensor) -> torch.Tensor:
        s = self.room.spread(scales)
        step, _ = self.activations.span((self.low / s).amin(), (self.high / s).amax())
        error = step.square() * (s.square() * self.beside).sum()
        for part in self.parts:
            steps = ((part * s[:, None]).flatten(1).amax(1) / self.weights.high).square().sum()
            error = error + step.square() * (s.square() * part.square().sum((0, 2))).sum()
            error = error + steps * part.shape[2] * (self.squares / s.square()).sum()
        return error / 12

    def by_exponent(self, exponent: float) -> torch.Tensor:
        reach = self.room.greatest(torch.maximum(-self.low, self.high)).clamp(min=1e-5)
        found = [part.amax((0, 2)) for part in self.parts] or [torch.ones_like(self.low)]
        greatest = torch.stack(found).amax(0).to(self.low.dtype)
        s = reach.pow(exponent) / self.room.greatest(greatest).clamp(min=1e-5).pow(1 - exponent)
        return s / s.log().mean().exp()

    def least(self) -> torch.Tensor:
        starts = [self.ones, *map(self.by_exponent, EXPONENTS)]
        best = min(starts, key=lambda s: float(self(s)))
        least = float(self(best))
        logarithm = best.log().requires_grad_(True)
        optimiser = torch.optim.Adam([logarithm], lr=_RATE)
        for _ in range(_STEPS):
            optimiser.zero_grad()
            with torch.enable_grad():
                error = self(logarithm.exp())
            if error.item() < least:
                best, least = logarithm.detach().exp(), error.item()
            error.log().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        return best
