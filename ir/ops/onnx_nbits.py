"""MatMulNBits of com.microsoft: a linear layer whose weight is stored in blocks of few bits, [outputs, blocks, bytes].

    y = x W' + b        W[o, k] = (code - zero) * scale, with a scale and a zero of each block of inputs of an output

It is read as what it stands for: codes are unpacked from their bytes, the lowest bits first, dequantized by blocks, and
inputs that only fill the last block are cut off. Without zero points 2^(bits-1) is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value

_BITS = (2, 4, 8)


def read_matmul_nbits(build: Builder, call: Any) -> Value:
    """MatMulNBits(x, weight, scales, zero_points, g_idx, bias)."""
    bits, block = call.attribute("bits", 4), call.attribute("block_size")
    outputs, inputs = call.attribute("N"), call.attribute("K")
    call.passes_over("accuracy_level")  # how roughly a runtime may multiply
    if call.attribute("weight_prepacked", 0):
        raise OperatorError("MatMulNBits with a weight that is laid out for one device has no rule")
    if bits not in _BITS or call.has(4):
        raise OperatorError(f"MatMulNBits of {bits} bits{' and an order of inputs' if call.has(4) else ''} has no rule")
    x, stored, scale = (call.operand(slot) for slot in range(3))
    if stored.dtype != torch.uint8 or x.dtype != scale.dtype:
        raise OperatorError(f"MatMulNBits of {stored.dtype} with scales of {scale.dtype} has no rule")
    blocks = -(-inputs // block)
    codes = build.reshape(_digits(build, stored, bits), shape=(outputs, blocks * block))
    scale = build.reshape(scale, shape=(outputs, blocks))
    zero = call.operand(3) if call.has(3) else None
    if zero is None:
        signed = build.add(build.cast(codes, dtype=torch.int32), -(1 << (bits - 1)))
        weight = build.dequantize(signed, scale, axis=1, block_size=block)
    elif zero.dtype == torch.uint8:
        each = -(-blocks * bits // 8)
        digits = _digits(build, build.reshape(zero, shape=(outputs, each)), bits)
        digits = build.slice(digits, dim=1, start=0, end=blocks) if digits.shape[1] != blocks else digits
        weight = build.dequantize(codes, scale, digits, axis=1, block_size=block)
    else:
        weight = _beside_floats(build, codes, scale, zero)
    if blocks * block != inputs:
        weight = build.slice(weight, dim=1, start=0, end=inputs)
    found: Value = build.linear(x, weight, call.operand(5) if call.has(5) else None)
    return found


def _digits(build: Builder, stored: Value, bits: int) -> Value:
    if bits == 8:
        return stored
    found: Value = build.unpack(stored, base=1 << bits, count=8 // bits)
    return found


def _beside_floats(build: Builder, codes: Value, scale: Value, zero: Value) -> Value:
    """With zeros that are floats."""
    outputs, blocks = (int(size) for size in scale.shape)
    parts = build.cast(build.reshape(codes, shape=(outputs, blocks, int(codes.shape[1]) // blocks)), dtype=scale.dtype)
    centred = build.sub(parts, build.reshape(zero, shape=(outputs, blocks, 1)))
    weight = build.mul(centred, build.unsqueeze(scale, dim=2))
    found: Value = build.reshape(weight, shape=tuple(codes.shape))
    return found


def write_matmul_nbits(nodes: Sequence[Node], patch: Any) -> None:
    """Of fewer outputs; inputs go in whole blocks."""
    weight = next(node for node in nodes if node.op == "linear").inputs[1]
    assert isinstance(weight, Value)
    patch.attribute("N", int(weight.shape[0]))
    patch.attribute("K", int(weight.shape[1]))
