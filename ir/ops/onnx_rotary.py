"""Rotary position embeddings as one ONNX operator, taken apart into the pointwise operators that other models use.

    halves        (x1 x2) -> (cos x1 - sin x2, sin x1 + cos x2), where each head holds x1 before x2
    interleaved   the same, where each head holds pairs of x1 and x2

So each index of the cosine table stands for a pair of a head's indices, and pairs are cut together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.ops.creation import numbers_from
from regauge.ir.ops.onnx_attention import in_heads, joined
from regauge.ir.ops.slicing import slice_axis
from regauge.ir.sizes.expressions import same


def _rotated(build: Builder, x: Value, cos: Value, sin: Value, interleaved: bool) -> Value:
    """x: b h s (2 r) or b h s (r 2); cos and sin: b 1 s r, or s r."""
    half = int(x.shape[3]) // 2
    if interleaved:
        pairs = build.reshape(x, shape=(*x.shape[:3], half, 2))
        first, second = (build.select(pairs, dim=4, index=i) for i in (0, 1))
    else:
        first, second = build.split(x, sizes=(half, half), dim=3)
    real = build.sub(build.mul(cos, first), build.mul(sin, second))
    imaginary = build.add(build.mul(sin, first), build.mul(cos, second))
    if interleaved:
        return build.reshape(build.stack(real, imaginary, dim=4), shape=x.shape)  # type: ignore[no-any-return]
    return build.concat(real, imaginary, dim=3)  # type: ignore[no-any-return]


def _table(build: Builder, cache: Value, positions: Value | None, length: Any) -> Value:
    """The rows of a cosine or sine table for each position, with an axis of size one for the heads."""
    if positions is None:
        return build.unsqueeze(cache, dim=1)  # type: ignore[no-any-return]
    if positions.rank == 1 and same(positions.shape[0], 1):  # where the first token stands
        places = build.add(numbers_from(build, 0, length, 1, torch.int64), positions)
        return build.embedding(cache, places)  # type: ignore[no-any-return]
    return build.unsqueeze(build.embedding(cache, positions), dim=1)  # type: ignore[no-any-return]


def _rotary(build: Builder, call: Any, cos: int, sin: int, positions: int) -> Value:
    x = call.operand(0)
    if call.attribute("scale", 1.0) != 1.0 or call.attribute("is_packed_batching", 0):
        raise OperatorError("RotaryEmbedding with a scale or packed batches has no rule")
    heads = call.attribute("num_heads", 0)
    size = call.attribute("rotary_embedding_dim", 0)
    if x.rank == 3 and not heads:
        if call.operand(cos).rank != 2:
            raise OperatorError("RotaryEmbedding of three axes needs num_heads")
        heads = int(x.shape[2]) // (2 * int(call.operand(cos).shape[-1]))
    split = in_heads(build, x, heads)
    places = call.operand(positions) if call.has(positions) else None
    tables = [_table(build, call.operand(slot), places, split.shape[2]) for slot in (cos, sin)]
    interleaved = bool(call.attribute("interleaved", 0))
    size = size or split.shape[3]
    turned = _rotated(build, slice_axis(build, split, 3, 0, size), tables[0], tables[1], interleaved)
    if not same(size, split.shape[3]):
        turned = build.concat(turned, slice_axis(build, split, 3, size), dim=3)
    return joined(build, turned) if x.rank == 3 else turned


def read_rotary(build: Builder, call: Any) -> Value:
    """RotaryEmbedding(x, cos, sin, positions) of opset 23."""
    return _rotary(build, call, cos=1, sin=2, positions=3)


def read_contrib_rotary(build: Builder, call: Any) -> Value:
    """RotaryEmbedding(x, positions, cos, sin) of com.microsoft."""
    return _rotary(build, call, cos=2, sin=3, positions=1)


def write_rotary(nodes: Sequence[Node], patch: Any) -> None:
    """The number of heads, and how much of a head is turned, where the ONNX node states them."""
    origin = nodes[0].origin.attributes
    product = next(node for node in nodes if node.op == "mul").output.shape
    if "num_heads" in origin and origin["num_heads"].value:
        patch.attribute("num_heads", product[1])
    if "rotary_embedding_dim" in origin and origin["rotary_embedding_dim"].value:
        patch.attribute("rotary_embedding_dim", 2 * product[3])
