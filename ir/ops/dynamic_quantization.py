"""Quantization by ranges that are found when it runs: of a whole tensor, or of each row.

quantize_dynamic   x ~ (q - zero_point) * scale, 0 ... 255 between the least and the greatest entry and 0
quantize_rows      x ~ q * scale, with the greatest magnitude of each row at 127

Both take ranges over axes that may be cut: what is left is then rounded by its own range.
"""

from __future__ import annotations

import torch
from torch import Tensor, randn

from regauge.ir.operator import operator, sample


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
    samples=lambda: [sample(3 * randn(2, 4, 3)), sample(randn(5, 6))],
)
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(x / scale).to(torch.int8), scale
