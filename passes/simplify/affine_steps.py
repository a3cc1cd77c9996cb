"""Scales and shifts of a value by weights: ``x * s``, ``x / s``, ``x + t``, ``x - t``, ``t - x``, ``-x``, batch norm.

Whatever operator it is, an affine step is ``scale * x + shift``, each of them a number or one number per index of some
axes of x. The rules that fold it into a linear map behind or before it need no more than that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from regauge.ir.axis_rules.rules import Axes
from regauge.ir.dims.extents import fresh
from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Value
from regauge.ir.rewriting.rewrite import refuse
from regauge.ir.sizes.expressions import same
from regauge.passes.simplify.fixed_values import Fixed, combined, fixed, number
from regauge.passes.simplify.linear_map import Factor, factor

PAIRS = ("mul", "div", "add", "sub")


class Affine(NamedTuple):
    """``scale * x + shift``; None for a scale of one and for a shift of zero."""

    scale: Factor | None
    shift: Factor | None


def moving_slot(build: Builder, node: Node) -> int:
    """The slot of the operand that is no weight; refuses where there is none, or more than one."""
    moving = [slot for slot in range(min(len(node.inputs), 2)) if fixed(build, node.inputs[slot]) is None]
    if node.op == "batch_norm":
        return 0
    return moving[0] if len(moving) == 1 else refuse(f"{node.op} has no operand that is a weight or a number")


def affine_of(build: Builder, node: Node, slot: int, axes: Axes) -> Affine:
    """What a node does to its operand in ``slot``, which has these axes; refuses where that is no affine step."""
    x = node.inputs[slot]
    if not isinstance(x, Value) or not isinstance(x.dtype, torch.dtype) or not x.dtype.is_floating_point:
        return refuse(f"{node.op} is not one of real numbers")
    if x.dtype != node.output.dtype or x.rank != node.output.rank or not all(map(same, x.shape, node.output.shape)):
        return refuse(f"{node.op} changes the type or the shape of {x}")
    if node.op == "batch_norm":
        return _batch_norm(build, node, axes)
    if node.op == "neg":
        return Affine(Factor(number(-1.0), fresh(1)), None)
    other = node.inputs[1 - slot]
    if node.op == "mul":
        return Affine(factor(build, other, axes), None)
    if node.op == "add":
        return Affine(None, factor(build, other, axes))
    if node.op == "sub" and slot == 0:
        return Affine(None, factor(build, other, axes, torch.neg))
    if node.op == "sub":
        return Affine(Factor(number(-1.0), fresh(1)), factor(build, other, axes))
    if node.op == "div" and slot == 0 and node.attributes["rounding_mode"] is None:
        return Affine(factor(build, other, axes, torch.reciprocal), None)
    return refuse(f"{node.op} is no scale and no shift")


def _batch_norm(build: Builder, node: Node, axes: Axes) -> Affine:
    scale, shift = batch_norm_affine(build, node)
    return Affine(Factor(scale, axes[1]), Factor(shift, axes[1]))


def batch_norm_affine(build: Builder, node: Node) -> tuple[Fixed, Fixed]:
    """``(x - mean) / sqrt(var + eps) * gain + shift`` as a scale and a shift over the channels."""
    operands = [*node.inputs[1:], *(None,) * (5 - len(node.inputs))]
    if node.attributes["training"] or operands[2] is None or operands[3] is None:
        return refuse("its statistics are those of the batch")
    parts = [fixed(build, number_) if number_ is not None else None for number_ in operands]
    if any(part is None and operand is not None for part, operand in zip(parts, operands, strict=True)):
        return refuse("its statistics or gains are computed, or written from run to run")
    gain, bias = parts[0] or number(1.0), parts[1] or number(0.0)
    mean, var = parts[2], parts[3]
    assert mean is not None and var is not None
    eps = node.attributes["eps"]
    scale = combined(lambda v, g: torch.rsqrt(v + eps) * g, var, gain)
    return scale, combined(lambda b, m, s: b - m * s, bias, mean, scale)
