"""What a weight that is kept costs in a run of a layer: the figure of which a share has to go.

LPViT (Xu et al. 2024, Low-Power Semi-structured Pruning for Vision Transformers) chooses blocks by the second-order
loss of removing them under a budget of power, which it takes from the connections that are kept and not from tables of
measurements. The cost of a block R x C of a layer that is given n rows per example is here

    weights   R C
    macs      R C n
    energy    R C n (multiply + add)  +  R C memory  +  n (C + 2 R) buffer

for each block of weights is fetched from memory once in a run, and for each row its C inputs are read from a buffer and
its R sums read and written there. A single weight is a block of 1 x 1. Deviation: the paper's own formula was not at
hand; this one follows its abstract, with energies of Horowitz 2014 (Computing's Energy Problem, 45 nm), of which only
the relations count.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from regauge.ir.cost import item_size
from regauge.passes.calibration.layers import Layer
from regauge.passes.sparsity.patterns import Blocks, Pattern

RunCost: TypeAlias = Literal["weights", "macs", "energy"]


class _Energy(NamedTuple):
    """Picojoules of arithmetic."""

    multiply: float
    add: float


_ARITHMETIC = {4: _Energy(3.7, 0.9), 2: _Energy(1.1, 0.4), 1: _Energy(0.2, 0.03)}  # by bytes of a number
_MEMORY = 1300 / 8  # picojoules per byte of DRAM
_BUFFER = 20 / 8  # and of 32 KB of SRAM


def cost_per_weight(cost: RunCost, layer: Layer, pattern: Pattern, rows: float) -> float:
    """What each kept weight costs per example: entries, multiply-accumulates, or picojoules; ``rows`` per example."""
    if cost == "weights":
        return 1.0
    if cost == "macs":
        return rows
    height, width = (pattern.rows, pattern.columns) if isinstance(pattern, Blocks) else (1, 1)
    size = item_size(layer.weight.dtype)
    arithmetic = _ARITHMETIC[min((n for n in _ARITHMETIC if n >= size), default=4)]
    moved = (width + 2 * height) / (height * width)  # numbers per row and weight
    return rows * (arithmetic.multiply + arithmetic.add + moved * size * _BUFFER) + size * _MEMORY
