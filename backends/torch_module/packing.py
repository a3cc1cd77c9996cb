"""Codes of few bits packed into bytes, as ``unpack_bits`` of torch_quantized.py reads them."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes 0 ... 2^bits - 1, uint8 [rows, count], as uint8 [rows, bytes]; what is left of a byte is 0."""
    rows, parts, shift = len(codes), [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            each = 8 // width
            part = codes >> shift & (1 << width) - 1
            part = F.pad(part, (0, -codes.shape[1] % each)).reshape(rows, -1, each)
            places = torch.arange(0, 8, width, dtype=torch.uint8)
            parts.append((part << places).sum(2, dtype=torch.uint8))
            shift += width
    return torch.cat(parts, 1)
