"""Rounding to a narrow floating-point type in training: of values, and of gradients on their way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, randn

from regauge.ir.graph import Node
from regauge.ir.operator import sample
from regauge.ir.ops.elementwise import pointwise


def _spell_fake_cast(onnx: Any, node: Node) -> Any:
    x, dtype = onnx.operand(0), node.attributes["dtype"]
    limit = torch.finfo(dtype).max
    clipped = onnx.Min(onnx.Max(x, -limit), limit)
    return onnx.cast(onnx.cast(clipped, dtype), node.output.dtype)


@pointwise(samples=lambda: [sample(randn(2, 3), dtype=torch.float8_e4m3fn)], spell=_spell_fake_cast)
def fake_cast(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Numbers of a narrower type, those out of its range at its ends; gradients go straight through."""
    limit = torch.finfo(dtype).max
    rounded = torch.clamp(x, -limit, limit).to(dtype).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


@pointwise(
    samples=lambda: [
        sample(randn(2, 3), dtype=torch.float8_e5m2),
        sample(randn(2, 3), dtype=torch.float8_e5m2, bias=2),
    ],
    spell=lambda onnx, node: onnx.Identity(onnx.operand(0)),
)
def gradient_cast(x: Tensor, *, dtype: torch.dtype, margin: int = 0, bias: int | None = None) -> Tensor:
    """The same numbers; their gradient is rounded to a narrow type.

    It is multiplied by 2^bias before, or by the power of two that brings its greatest entry as near to the greatest
    number of the type as ``margin`` lets it, and divided by that behind.
    """
    if torch.compiler.is_exporting() or not x.requires_grad:
        return x

    def rounded(gradient: Tensor) -> Tensor:
        limit = torch.finfo(dtype).max
        greatest = torch.clamp(gradient.abs().amax(), min=1e-30)
        fitting = torch.floor(torch.log2(limit / greatest)) - margin
        scale = torch.exp2(fitting if bias is None else torch.full_like(fitting, bias))
        return torch.clamp(gradient * scale, -limit, limit).to(dtype).to(gradient.dtype) / scale

    same = x.view_as(x)
    same.register_hook(rounded)  # type: ignore[no-untyped-call]
    return same
