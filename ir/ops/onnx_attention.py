"""Attention as ONNX writes it: ai.onnx Attention (opset 23), and Attention and MultiHeadAttention of com.microsoft.

All of them are read as: split into heads, ``attention``, join the heads. Head counts live in attributes of the node,
and so must the scale once a head has been cut: without it a runtime derives the scale from the smaller head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.ops.creation import numbers_from
from regauge.ir.sizes.expressions import Size, floor_divide, product, same

LOWEST = -10000.0  # what com.microsoft operators add where a mask is 0, unless told otherwise


def in_heads(build: Builder, x: Value, heads: int | None) -> Value:
    """``b s (h d) -> b h s d``; a tensor of rank 4 has its heads apart already."""
    if x.rank == 4:
        return x
    if x.rank != 3 or not heads:
        raise OperatorError(f"{x} cannot be split into heads: three axes and a number of heads are expected")
    batch, length, width = x.shape
    split = build.reshape(x, shape=(batch, length, heads, floor_divide(width, heads)))
    return build.permute(split, dims=(0, 2, 1, 3))  # type: ignore[no-any-return]


def joined(build: Builder, x: Value) -> Value:
    """``b h s d -> b s (h d)``"""
    batch, heads, length, depth = x.shape
    ordered = build.permute(x, dims=(0, 2, 1, 3))
    return build.reshape(ordered, shape=(batch, length, product((heads, depth))))  # type: ignore[no-any-return]


def causal_keep(build: Builder, length: Size, source: Size, past: Size) -> Value:
    """True where key j may be seen by query i: ``j <= i + past``."""
    queries = numbers_from(build, 0, length, 1, torch.int64)
    keys = numbers_from(build, 0, source, 1, torch.int64)
    last = build.unsqueeze(queries if same(past, 0) else build.add(queries, past), dim=1)
    return build.le(build.unsqueeze(keys, dim=0), last)  # type: ignore[no-any-return]


def _masked_by(build: Builder, keep: Value, mask: Value | None, lowest: float) -> Value:
    if mask is None:
        return keep
    if mask.dtype == torch.bool:
        return build.logical_and(keep, mask)  # type: ignore[no-any-return]
    return build.where(keep, mask, lowest)  # type: ignore[no-any-return]


def _attend(
    build: Builder, q: Value, k: Value, v: Value, mask: Value | None, *, scale: float, causal: bool, past: Size,
    softcap: float = 0.0, lowest: float = -math.inf,
) -> Value:  # fmt: skip
    """Attention with whatever a causal flag, a cache before the keys and a mask say together."""
    if causal and (mask is not None or not same(past, 0)):
        mask = _masked_by(build, causal_keep(build, q.shape[2], k.shape[2], past), mask, lowest)
        causal = False
    options = {
        "scale": scale,
        "is_causal": causal,
        "enable_gqa": not same(q.shape[1], k.shape[1]),
        "head_size": q.shape[3],
    }
    if softcap:
        return build.capped_attention(q, k, v, mask, softcap=softcap, **options)  # type: ignore[no-any-return]
    return build.attention(q, k, v, mask, **options)  # type: ignore[no-any-return]


def _after_past(build: Builder, call: Any, slot: int, x: Value) -> tuple[Value, Size]:
    """Keys or values behind those of the cache, and how many the cache held."""
    if not call.has(slot):
        return x, 0
    past = call.operand(slot)
    return build.concat(past, x, dim=2), past.shape[2]


def _given_scale(call: Any, q: Value) -> float:
    given = call.attribute("scale")
    return float(given) if given else 1 / math.sqrt(int(q.shape[3]))


def read_attention(build: Builder, call: Any) -> tuple[Value | None, ...]:
    """Attention(Q, K, V, mask, past_key, past_value) -> Y, present_key, present_value."""
    if call.has(6) or call.wanted(3):
        raise OperatorError("Attention with padded caches, or with its scores as a result, has no rule")
    heads, shared = call.attribute("q_num_heads"), call.attribute("kv_num_heads")
    x = call.operand(0)
    q = in_heads(build, x, heads)
    k, past = _after_past(build, call, 4, in_heads(build, call.operand(1), shared))
    v, _ = _after_past(build, call, 5, in_heads(build, call.operand(2), shared))
    mask = call.operand(3) if call.has(3) else None
    if mask is not None and not same(mask.shape[-1], k.shape[2]) and not same(mask.shape[-1], 1):
        raise OperatorError("an attention mask shorter than the keys has no rule")
    causal, softcap = bool(call.attribute("is_causal", 0)), call.attribute("softcap", 0.0)
    mixed = _attend(build, q, k, v, mask, scale=_given_scale(call, q), causal=causal, past=past, softcap=softcap)
    return (joined(build, mixed) if x.rank == 3 else mixed, k, v)


def _attention_node(nodes: Sequence[Node]) -> Node:
    return next(node for node in nodes if node.op in ("attention", "capped_attention"))


def write_attention(nodes: Sequence[Node], patch: Any) -> None:
    """Head counts where the ONNX node states them, and always the scale."""
    node = _attention_node(nodes)
    q, k = node.inputs[0], node.inputs[1]
    assert isinstance(q, Value) and isinstance(k, Value)
    counts = {"q_num_heads": q.shape[1], "kv_num_heads": k.shape[1], "num_heads": q.shape[1]}
    for name, count in counts.items():
        if name in node.origin.attributes:
            patch.attribute(name, count)
    patch.attribute("scale", node.attributes["scale"])


# -- com.microsoft -----------------------------------------------------------------------------------------------------


def _padding_bias(build: Builder, mask: Value, dtype: Any, lowest: float) -> Value:
    """A mask of ones and zeros over (batch, s) or (batch, l, s) as numbers to add to the scores."""
    if mask.rank not in (2, 3):
        raise OperatorError(f"a padding mask of rank {mask.rank}, which holds lengths, has no rule")
    kept = build.cast(build.gt(mask, 0), dtype=dtype)
    bias = build.mul(build.sub(kept, 1.0), -lowest)
    for _ in range(4 - mask.rank):
        bias = build.unsqueeze(bias, dim=1)
    return bias  # type: ignore[no-any-return]


def _bias(build: Builder, call: Any, q: Value, mask_slot: int, bias_slot: int) -> Value | None:
    """Padding mask and additive bias together."""
    lowest = call.attribute("mask_filter_value", LOWEST)
    bias = call.operand(bias_slot) if call.has(bias_slot) else None
    if not call.has(mask_slot):
        return bias
    padding = _padding_bias(build, call.operand(mask_slot), q.dtype, lowest)
    return padding if bias is None else build.add(padding, bias)


def read_contrib_attention(build: Builder, call: Any) -> Value:
    """Attention(x, weights, bias, mask_index, past, attention_bias): one projection to q, k and v, then attention."""
    if call.has(4) or call.wanted(1) or call.attribute("do_rotary", 0):
        raise OperatorError("com.microsoft Attention with a cache or a rotation has no rule")
    call.passes_over("past_present_share_buffer", "rotary_embedding_dim")  # of the cache and the rotation
    x, weight = call.operand(0), call.operand(1)
    heads = call.attribute("num_heads")
    third = floor_divide(weight.shape[1], 3)
    sizes = tuple(call.attribute("qkv_hidden_sizes") or (third,) * 3)
    joint = build.matmul(x, weight)
    joint = build.add(joint, call.operand(2)) if call.has(2) else joint
    q, k, v = (in_heads(build, part, heads) for part in build.split(joint, sizes=sizes, dim=2))
    mask = _bias(build, call, q, 3, 5)
    causal = bool(call.attribute("unidirectional", 0))
    lowest = call.attribute("mask_filter_value", LOWEST)
    mixed = _attend(build, q, k, v, mask, scale=_given_scale(call, q), causal=causal, past=0, lowest=lowest)
    return joined(build, mixed)


def write_contrib_attention(nodes: Sequence[Node], patch: Any) -> None:
    split = next(node for node in nodes if node.op == "split")
    write_attention(nodes, patch)
    if "qkv_hidden_sizes" in split.origin.attributes or len(set(split.attributes["sizes"])) > 1:
        patch.attribute("qkv_hidden_sizes", list(split.attributes["sizes"]))


def read_multi_head_attention(build: Builder, call: Any) -> tuple[Value | None, ...]:
    """MultiHeadAttention(q, k, v, bias, padding mask, attention bias, past_key, past_value) -> Y, present k and v."""
    if call.operand(0).rank != 3 or not call.has(1) or not call.has(2) or call.wanted(3):
        raise OperatorError("MultiHeadAttention with packed operands, or with its scores as a result, has no rule")
    heads = call.attribute("num_heads")
    tensors = [call.operand(i) for i in range(3)]
    if call.has(3):
        if any(x.rank != 3 for x in tensors):
            raise OperatorError("MultiHeadAttention with a bias for keys of a cache has no rule")
        parts = build.split(call.operand(3), sizes=tuple(x.shape[2] for x in tensors), dim=0)
        tensors = [build.add(x, part) for x, part in zip(tensors, parts, strict=True)]
    q, k, v = (in_heads(build, x, heads) for x in tensors)
    k, past = _after_past(build, call, 6, k)
    v, _ = _after_past(build, call, 7, v)
    mask = _bias(build, call, q, 4, 5)
    causal = bool(call.attribute("unidirectional", 0))
    lowest = call.attribute("mask_filter_value", LOWEST)
    mixed = _attend(build, q, k, v, mask, scale=_given_scale(call, q), causal=causal, past=past, lowest=lowest)
    return (joined(build, mixed), k, v)
