"""Cross-layer equalization (Nagel et al. 2019, Data-Free Quantization, section 4.1), over whatever shares a Dim.

With r1_i the greatest magnitude of what writes channel i and r2_i of what reads it, s_i = sqrt(r1_i / r2_i) makes both
sqrt(r1_i r2_i). The paper goes over pairs of layers until nothing moves; here the sides of a frame are all its writers
and all its readers, so that branches, residual sums, concatenations and groups take part. A depthwise layer reads one
frame and writes the next: in the end its range, that before it and that behind it are the cube root of their product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.ir.gauge.classes import Gauge
from regauge.ir.gauge.frames import Frame
from regauge.ir.graph import Graph, Parameter
from regauge.passes.quantization.frame_weights import Balance, FrameWeight, balance_of, greatest

ROUNDS = 200
SETTLED = 1e-3  # the greatest |s - 1| of the last round


def balances(graph: Graph, frames: Sequence[Frame]) -> list[Balance]:
    """The frames that admit a scale and lie between weights."""
    found = [balance_of(graph, frame) for frame in frames if Gauge.SCALE in frame.gauge]
    return [balance for balance in found if balance.writers and balance.readers]


def equalizing(between: Sequence[Balance]) -> tuple[dict[Frame, torch.Tensor], int]:
    """By what the values of each frame are multiplied, and how many rounds it took."""
    sides = [side for balance in between for side in (*balance.writers, *balance.readers)]
    weights: dict[Parameter, torch.Tensor] = {}
    for weight in {side.parameter for side in sides}:
        indices = [side.scales for side in sides if side.parameter is weight]
        idle = [axis for axis in range(weight.rank) if all(index.shape[axis] == 1 for index in indices)]
        size = weight.tensor.detach().double().abs()
        weights[weight] = size.amax(idle, keepdim=True) if idle else size  # places of a kernel are scaled alike
    scales = {b.frame: torch.ones(b.frame.shape, dtype=torch.float64).reshape(-1) for b in between}
    rounds, moved = 0, float("inf")
    while rounds < ROUNDS and moved >= SETTLED:
        rounds, moved = rounds + 1, 0.0
        for balance in between:
            step = _step(balance, weights)
            scales[balance.frame] *= step
            moved = max(moved, float((1 / step - 1).abs().max()))
    return {frame: scale.reshape(frame.shape) for frame, scale in scales.items()}, rounds


def _step(balance: Balance, weights: dict[Parameter, torch.Tensor]) -> torch.Tensor:
    """Equalize one frame: what its values are multiplied by, 1 where nothing writes or reads an index."""
    count = int(torch.Size(balance.frame.shape).numel())
    written, read = (_reach(side, weights, count) for side in (balance.writers, balance.readers))
    step = torch.where((written > 0) & (read > 0), (read / written).sqrt(), 1.0)
    table = torch.cat([step, torch.ones(1, dtype=step.dtype)])
    for side, factor in ((balance.writers, table), (balance.readers, 1 / table)):
        for parameter, index in side:
            weights[parameter] = weights[parameter] * factor[index]
    return step


def _reach(side: Sequence[FrameWeight], weights: dict[Parameter, torch.Tensor], count: int) -> torch.Tensor:
    return torch.stack([greatest(weights[parameter], index, count) for parameter, index in side]).amax(0)
