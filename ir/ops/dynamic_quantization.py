"""Quantization by ranges that are found when it runs: of a whole tensor, or of each row.

quantize_dynamic   x ~ (q - zero_point) * scale, 0 ... 255 between the least and the greatest entry and 0
quantize_rows      x ~ q * scale, with the greatest magnitude of each row at 127; as floats of 8 bits with scales that
                   are powers of two, the least ones with which nothing is beyond the greatest float
row_scales         the scales of that, and
row_codes          the codes for given ones: the same, as what kernels compute behind what gives the rows

The first two take ranges over axes that may be cut: what is left is then rounded by its own range.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, randn

from regauge.ir import scalars
from regauge.ir.graph import Node
from regauge.ir.operator import operator, sample
from regauge.ir.ops.spell_reduction import AXES_AS_INPUT
from regauge.ir.scalars import Scalar


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


LEAST_SCALE = 2.0**-24
"""The least scale of a row of floats of 8 bits: half precision has no smaller number."""


@operator(
    rule="... k -> ... k, ... 1 ; normalise k",
    samples=lambda: [
        sample(3 * randn(2, 4, 3)),
        sample(randn(5, 6)),
        sample(randn(5, 6), dtype=torch.float8_e4m3fn),
    ],
)
def quantize_rows(x: Tensor, *, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    scale = _scale_of_rows(x, dtype)
    return _codes_of_rows(x, scale, dtype), scale


def _scale_of_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    most = x.abs().amax(-1, keepdim=True)
    if not dtype.is_floating_point:
        scale = most / 127
        return torch.where(scale > 0, scale, torch.ones_like(scale))
    wide = most.to(torch.promote_types(x.dtype, torch.float32))  # in half precision quotients are rounded down, too
    least = torch.clamp(wide.detach() / torch.finfo(dtype).max, min=LEAST_SCALE)
    fraction = torch.frexp(least).mantissa
    scale = torch.where((fraction > 0.5) & least.isfinite(), least / fraction, least)
    return torch.where(wide > 0, scale, 1.0).to(x.dtype)


def _codes_of_rows(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        return torch.round(x / scale).to(dtype)
    limits = torch.finfo(dtype)
    return torch.clamp(x / scale, limits.min, limits.max).to(dtype)


def _spell_row_scales(onnx: Any, node: Node) -> Any:
    most = onnx.on_axes("ReduceMax", onnx.Abs(onnx.operand(0)), [-1], since=AXES_AS_INPUT, keepdims=1)
    dtype = node.attributes["dtype"]
    if not dtype.is_floating_point:
        scale = onnx.Div(most, 127.0)
        return onnx.Where(onnx.Greater(scale, 0.0), scale, 1.0)
    least = onnx.Max(onnx.Div(onnx.cast(most, torch.float32), torch.finfo(dtype).max), LEAST_SCALE)
    power = onnx.Pow(2.0, onnx.Ceil(onnx.Div(onnx.Log(least), math.log(2))))
    half = onnx.Mul(power, 0.5)  # the logarithm is rounded: the power may be the one above the right one, or below it
    power = onnx.Where(onnx.Less(half, least), power, half)
    power = onnx.Where(onnx.Less(power, least), onnx.Mul(power, 2.0), power)
    return onnx.Where(onnx.Greater(most, 0.0), onnx.cast(power, node.output.dtype), 1.0)


def _row_scale(x: Scalar, *, dtype: torch.dtype) -> Scalar | None:
    most = scalars.amax(scalars.abs_(x))
    if not dtype.is_floating_point:
        return scalars.where(most > 0, most / 127, 1.0)
    if dtype not in scalars.ROUNDED_8:
        return None
    power = scalars.power_of_two(scalars.maximum(most / torch.finfo(dtype).max, LEAST_SCALE))
    return scalars.where(most > 0, power, 1.0)


def _row_code(x: Scalar, scale: Scalar, *, dtype: torch.dtype) -> Scalar | None:
    if not dtype.is_floating_point:
        return scalars.code(scalars.round_(x / scale))
    limits = torch.finfo(dtype)
    return scalars.float8(scalars.clamp(x / scale, limits.min, limits.max), dtype)


def _spell_row_codes(onnx: Any, node: Node) -> Any:
    dtype, codes = node.attributes["dtype"], onnx.Div(onnx.operand(0), onnx.operand(1))
    if not dtype.is_floating_point:
        return onnx.cast(onnx.Round(codes), dtype)
    limits = torch.finfo(dtype)
    return onnx.cast(onnx.Min(onnx.Max(codes, limits.min), limits.max), dtype)


@operator(
    rule="... k -> ... 1 ; reduce k",
    samples=lambda: [
        sample(3 * randn(2, 4, 3)),
        sample(randn(5, 6)),
        sample(randn(5, 6), dtype=torch.float8_e4m3fn),
        sample(900 * randn(2, 4, 3), dtype=torch.float8_e5m2),
    ],
    spell=_spell_row_scales,
    element=_row_scale,
)
def row_scales(x: Tensor, *, dtype: torch.dtype = torch.int8) -> Tensor:
    return _scale_of_rows(x, dtype)


@operator(
    rule="... k, ... 1 -> ... k",
    spell=_spell_row_codes,
    samples=lambda: [
        sample(randn(2, 4, 3), randn(2, 4, 1).abs() / 30 + 0.1),
        sample(randn(5, 6), randn(5, 1).abs() + 1),
        sample(900 * randn(5, 6), randn(5, 1).abs() + 1, dtype=torch.float8_e4m3fn),
        sample(1e5 * randn(2, 4, 3), randn(2, 4, 1).abs() + 1, dtype=torch.float8_e5m2),
    ],
    element=_row_code,
    coding=True,
)
def row_codes(x: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.int8) -> Tensor:
    return _codes_of_rows(x, scale, dtype)
