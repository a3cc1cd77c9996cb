"""Quantization by ranges that are found when it runs: of a whole tensor, or of each row.

quantize_dynamic   x ~ (q - zero_point) * scale, 0 ... 255 between the least and the greatest entry and 0
quantize_rows      x ~ q * scale, with the greatest magnitude of each row at 127; as floats of 8 bits with scales that
                   are powers of two, the least ones with which nothing is beyond the greatest float
row_scales         the scales of that, and
row_codes          the codes for given ones: the same, as what kernels compute behind what gives the rows

The first two take ranges over axes that may be cut: what is left is then rounded by its own range.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, randn

from regauge.ir import scalars
from regauge.ir.graph import Node
from regauge.ir.operator import operator, sample
from regauge.ir.ops.spell_reduction import AXES_AS_INPUT


@operator(
    rule="x... -> x..., , ; normalise x",
    onnx={"DynamicQuantizeLinear": None},
    samples=lambda: [sample(3 * randn(2, 4, 3)), sample(randn(5, 6) + 2)],
)
def quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if torch.onnx.is_in_onnx_export():
        kinds, shapes = (torch.uint8, x.dtype, torch.uint8), (x.shape, (), ())
        q, s, z = torch.onnx.ops.symbolic_multi_out(
            "DynamicQuantizeLinear", (x,), dtypes=kinds, shapes=shapes, version=11
        )
        return q, s, z
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round(-low / scale).clamp(0, 255)
    q = torch.clamp(torch.round(x / scale) + zero, 0, 255)
    return q.to(torch.uint8), scale, zero.to(torch.uint8)


@operator(
    rule="... k -> ... k, ... 1 ; normalise k",
    samples=lambda: [
        sample(3 * randn(2, 4, 3)),
        sample(randn(5, 6)),
        sample(randn(5, 6), dtype=torch.float8_e4m3fn),
    ],
)
def quantize_rows(x: Tensor, *, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / (torch.finfo(dtype).max if dtype.is_floating_point else 127)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if dtype.is_floating_point:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
        return (x / scale).to(dtype), scale
    return torch.round(x / scale).to(dtype), scale


def _spell_row_scales(onnx: Any, node: Node) -> Any:
    most = onnx.on_axes("ReduceMax", onnx.Abs(onnx.operand(0)), [-1], since=AXES_AS_INPUT, keepdims=1)
    scale = onnx.Div(most, 127.0)
    return onnx.Where(onnx.Greater(scale, 0.0), scale, 1.0)


def _row_scale(x: Any) -> Any:
    most = scalars.amax(scalars.abs_(x)) / 127
    return scalars.where(most > 0, most, 1.0)


@operator(
    rule="... k -> ... 1 ; reduce k",
    samples=lambda: [sample(3 * randn(2, 4, 3)), sample(randn(5, 6))],
    spell=_spell_row_scales,
    element=_row_scale,
)
def row_scales(x: Tensor) -> Tensor:
    scales: Tensor = quantize_rows(x)[1]
    return scales


@operator(
    rule="... k, ... 1 -> ... k",
    spell=lambda onnx, node: onnx.cast(onnx.Round(onnx.Div(onnx.operand(0), onnx.operand(1))), torch.int8),
    samples=lambda: [
        sample(randn(2, 4, 3), randn(2, 4, 1).abs() / 30 + 0.1),
        sample(randn(5, 6), randn(5, 1).abs() + 1),
    ],
    element=lambda x, scale: scalars.code(scalars.round_(x / scale)),
    coding=True,
)
def row_codes(x: Tensor, scale: Tensor) -> Tensor:
    return torch.round(x / scale).to(torch.int8)
