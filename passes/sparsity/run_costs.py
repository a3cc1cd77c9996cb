"""What a weight that is kept costs in a run of a layer: the figure of which a share has to go.

LPViT (Xu et al. 2024, Low-Power Semi-structured Pruning for Vision Transformers) chooses blocks by the second-order
loss of removing them and by the power that the kept ones take, which is parametric: no table is measured. The cost of a
block R x C of a layer with i input channels that is given n rows per example is here

    weights   R C
    macs      R C n
    power     i / 16                    as the authors' code has it, whatever the size of the block
    energy    R C n (multiply + add)  +  R C memory  +  n (C + 2 R) buffer

The last is ours, for networks whose layers run unlike often: each block of weights is fetched from memory once in a
run, and for each row its C inputs are read from a buffer and its R sums read and written there. A single weight is a
block of 1 x 1. Energies are those of Horowitz 2014 (Computing's Energy Problem, 45 nm), of which only the relations
count.

Deviations from LPViT: a share of the cost has to go, where the paper adds it with a factor to the loss under a budget
of operations; the loss is that of each layer after its refit, weighed by how much the outputs move with it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from regauge.ir.cost import item_size
from regauge.passes.calibration.layers import Layer
from regauge.passes.sparsity.patterns import Blocks, Pattern

RunCost: TypeAlias = Literal["weights", "macs", "power", "energy"]


class _Energy(NamedTuple):
    """Picojoules of arithmetic."""

    multiply: float
    add: float


_ARITHMETIC = {4: _Energy(3.7, 0.9), 2: _Energy(1.1, 0.4), 1: _Energy(0.2, 0.03)}  # by bytes of a number
_MEMORY = 1300 / 8  # picojoules per byte of DRAM
_BUFFER = 20 / 8  # and of 32 KB of SRAM


def cost_per_weight(cost: RunCost, layer: Layer, pattern: Pattern, rows: float) -> float:
    """What each kept weight costs per example: 1, multiply-accumulates, LPViT's power, or picojoules.

    ``rows`` are those of the layer's input, per example.
    """
    if cost == "weights":
        return 1.0
    if cost == "macs":
        return rows
    height, width = (pattern.rows, pattern.columns) if isinstance(pattern, Blocks) else (1, 1)
    if cost == "power":
        return layer.columns / layer.taps / 16 / (height * width)
    size = item_size(layer.weight.dtype)
    arithmetic = _ARITHMETIC[min((n for n in _ARITHMETIC if n >= size), default=4)]
    moved = (width + 2 * height) / (height * width)  # numbers per row and weight
    return rows * (arithmetic.multiply + arithmetic.add + moved * size * _BUFFER) + size * _MEMORY
