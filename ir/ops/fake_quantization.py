"""Fake quantization: numbers rounded to a grid of integers and back, with gradients, as training needs it.

What ``fake_quantize`` gives is what ``dequantize`` gives of ``quantize``, to the bit. Rounding passes gradients
straight through (Bengio et al. 2013, Estimating or Propagating Gradients Through Stochastic Neurons), so that those of
a scale are the ones of LSQ (Esser et al. 2020, Learned Step Size Quantization, eq. 3); entries that are clipped get
none.
"""

from __future__ import annotations

import torch
from torch import Tensor, rand, randint, randn

from regauge.ir.axis_rules.rules import Call
from regauge.ir.operator import operator, sample
from regauge.ir.ops.quantization import scaled_rule


def spread(scale: Tensor, x: Tensor, axis: int | None, block_size: int | None) -> Tensor:
    """Scales or zero points in a shape that broadcasts against ``x``."""
    if block_size is not None:
        return scale.repeat_interleave(block_size, axis)
    return scale if axis is None else scale.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def straight_round(x: Tensor) -> Tensor:
    """The nearest integers, halves to even, with the gradient of ``x``."""
    return torch.round(x).detach() + (x - x.detach())


@operator(
    rule=scaled_rule,
    samples=lambda: [
        sample(3 * randn(2, 4, 3), torch.tensor(0.05), torch.tensor(130, dtype=torch.uint8), low=0, high=255),
        sample(3 * randn(4, 6), (rand(4) + 0.5) / 40, axis=0, low=-128, high=127),
        sample(3 * randn(4, 6), rand(6) + 0.5, axis=1, low=-2, high=1, midrise=True),
        sample(3 * randn(5, 6), rand(5, 3) + 0.5, randint(0, 16, (5, 3)), axis=1, block_size=2, low=0, high=15),
    ],
)
def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
    block_size: int | None = None,
    low: int,
    high: int,
    midrise: bool = False,
) -> Tensor:
    step = spread(scale, x, axis, block_size)
    if midrise:  # levels half way between integers, none of them 0
        return (torch.clamp(straight_round(x / step - 0.5), low, high) + 0.5) * step
    zero = 0 if zero_point is None else spread(zero_point, x, axis, block_size)
    return (torch.clamp(straight_round(x / step) + zero, low, high) - zero) * step


def _mean_rule(call: Call) -> str:
    axis = call.normal(call["axis"], call.rank(0))
    before, after = (
        " ".join(f"{side}{i}" for i in range(n)) for side, n in (("a", axis), ("z", call.rank(0) - axis - 1))
    )
    if call["block_size"] is None:
        return f"{before} c {after} -> c"
    return f"{before} (b k) {after} -> {before} b {after} ; whole k ; block_size = k"


@operator(
    rule=_mean_rule,
    samples=lambda: [
        sample(randn(4, 6, 3), axis=0, bits=2),
        sample(randn(4, 6), axis=1, bits=4),
        sample(randn(4, 6), axis=1, block_size=3, bits=3),
    ],
)
def mean_scale(x: Tensor, *, axis: int, block_size: int | None = None, bits: int) -> Tensor:
    """Steps of 2^bits levels that reach to twice the mean magnitude on both sides; no gradient passes (StatsQ).

    Where all is zero the mean counts as 1e-6, so that a bias still has room in 32 bits of such steps.
    """
    magnitude = x.detach().abs()
    if block_size is None:
        means = magnitude.movedim(axis, 0).flatten(1).mean(1)
    else:
        axis %= x.dim()
        means = magnitude.reshape(*x.shape[:axis], -1, block_size, *x.shape[axis + 1 :]).mean(axis + 1)
    scale: Tensor = means.clamp(min=1e-6) * (4 / 2**bits)
    return scale


@operator(rule="x..., l -> x... ; whole l", samples=lambda: [sample(randn(4, 6), randn(4))])
def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """The nearest of some numbers; gradients reach these alone, each from the entries that it stands for."""
    levels = torch.sort(levels).values
    return levels[torch.bucketize(x.detach(), (levels[1:] + levels[:-1]) / 2)]
