"""Attention: softmax(q k' * scale + mask) v as one node, with the scale as a number that cuts never change.

    q  ... h l d     k  ... h s d     v  ... h s e     mask  ... h l s     ->  ... h l e

With ``is_causal`` query i sees the keys up to place i, and with ``lower_right``, too, as many more as there are more
keys than queries: the last query sees all, as where queries are the last positions behind a cache. With ``enable_gqa``
the heads of q are ``(h r)``: r neighbouring query heads share one key and value head. A mask is
true where a position takes part, or a number that is added; its axes are those of the scores, heads included, so that
a relative bias is cut with the heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import Extent, size_of
from regauge.ir.edit import Builder
from regauge.ir.errors import AxisError
from regauge.ir.graph import Value
from regauge.ir.operator import Cost, OnnxForm, Sample, operator, sample
from regauge.ir.ops.encoder_layer import native_attention, native_encoder_layer
from regauge.ir.ops.onnx_attention import (
    read_attention,
    read_contrib_attention,
    read_multi_head_attention,
    write_attention,
    write_contrib_attention,
)
from regauge.ir.ops.onnx_rotary import read_contrib_rotary, read_rotary, write_rotary
from regauge.ir.ops.spell_attention import spell_attention, spelled_for_torch
from regauge.ir.scalars import Scalar
from regauge.ir.scales.scaling import Scaling
from regauge.ir.sizes.expressions import Size, divide, same

# -- the rule ----------------------------------------------------------------------------------------------------------


def _attention_rule(call: Call) -> list[Axes]:
    q, k, v = call.operand(0), call.operand(1), call.operand(2)
    if min(len(q), len(k), len(v)) < 2:
        raise AxisError(f"{call.where}: attention needs operands of two axes at least")
    *query_batch, length, depth = q
    *key_batch, source, key_depth = k
    *value_batch, value_source, width = v
    call.unify(depth, key_depth)
    call.unify(source, value_source)
    if call["enable_gqa"]:
        _share_heads(call, query_batch, key_batch)
        _share_heads(call, query_batch, value_batch)
        batch = call.broadcast([query_batch[:-1], key_batch[:-1], value_batch[:-1]]) + query_batch[-1:]
    else:
        batch = call.broadcast([query_batch, key_batch, value_batch])
    if call.has(3):
        call.broadcast([[*batch, length, source], call.operand(3)])
    _state_roles(call, batch, length, source, depth, width)
    return [[*batch, length, width]]


def _share_heads(call: Call, query: Axes, other: Axes) -> None:
    """``(h r)`` heads of q read ``h`` heads of k or v."""
    heads = size_of(other[-1])
    shared = divide(size_of(query[-1]), heads)
    if shared is None:
        raise AxisError(f"{call.where}: {query[-1]} query heads cannot share {other[-1]} heads")
    call.unify(call.reshape([query[-1]], [heads, shared])[0], other[-1])


def _state_roles(call: Call, batch: Axes, length: Extent, source: Extent, depth: Extent, width: Extent) -> None:
    for extent in batch:
        call.role("map", extent)
    call.role("scan" if call["is_causal"] else "map", length)
    call.role("scan" if call["is_causal"] else "normalise", source)
    call.role("contract", depth)
    call.role("produce", width)
    call.linear(depth, width)
    if call.node.attributes.get("head_size") is not None:
        call.derive(head_size=depth)


def _macs(cost: Cost) -> Size:
    """Both products; for a mask of triangles too, because kernels differ in what they skip."""
    return cost.count(0) * cost.size(1, -2) + cost.out() * cost.size(1, -2)


def _samples() -> list[Sample]:
    q, k, v = randn(2, 4, 3, 6), randn(2, 4, 5, 6), randn(2, 4, 5, 2)
    few_k, few_v = randn(2, 2, 5, 6), randn(2, 2, 5, 2)
    return [
        sample(q, k, v, scale=0.3),
        sample(q, k, v, randn(1, 4, 3, 5), scale=0.3),
        sample(q, k, v, randn(3, 5) > -1, scale=0.3),
        sample(q, few_k, few_v, scale=0.5, enable_gqa=True),
        sample(q, few_k, few_v, randn(2, 4, 3, 5), scale=0.5, enable_gqa=True),
        sample(q, k[:, :, :3], v[:, :, :3], scale=0.4, is_causal=True),
        sample(q, k, v, scale=0.4, is_causal=True, lower_right=True),
        sample(randn(3, 6), randn(5, 6), randn(5, 2), scale=0.4),
        sample(q, k[:, :1], v[:, :1], randn(2, 1, 1, 5), scale=0.4),
        sample(q, k, v, torch.tensor([[True], [False], [True]]), scale=0.3),
    ]


# -- the element -------------------------------------------------------------------------------------------------------

_DEPTH, _LENGTH, _SOURCE = (0, -1), (0, -2), (1, -2)


def _masked(scores: Scalar, mask: Scalar | None, is_causal: bool, lower_right: bool) -> Scalar:
    """What a mask, or the order of positions, leaves of scores; a position that takes no part has minus infinity."""
    if mask is not None:
        scores = scalars.where(mask, scores, -math.inf) if mask.truth else scores + mask
    if is_causal:
        source, length = (scalars.index(axis, from_end=lower_right) for axis in (_SOURCE, _LENGTH))
        scores = scalars.where(source <= length, scores, -math.inf)
    return scores


def _element(
    q: Scalar, k: Scalar, v: Scalar, mask: Scalar | None = None, *,
    scale: float, is_causal: bool = False, lower_right: bool = False, dropout_p: float = 0.0, **_: Any,
) -> Scalar | None:  # fmt: skip
    """A query without any position gives zero, so that its greatest score is not subtracted from itself."""
    if dropout_p:
        return None
    scores = _masked(scalars.sum_(q * k, _DEPTH) * scale, mask, is_causal, lower_right)
    greatest = scalars.amax(scores, _SOURCE)
    none = scalars.eq(greatest, -math.inf)
    weights = scalars.exp(scores - scalars.where(none, 0.0, greatest))
    mean = scalars.sum_(weights * v, _SOURCE) / scalars.sum_(weights, _SOURCE)
    return scalars.where(none, 0.0, mean)


def _capped_element(
    q: Scalar, k: Scalar, v: Scalar, mask: Scalar | None = None, *,
    scale: float, softcap: float, is_causal: bool = False, lower_right: bool = False, **_: Any,
) -> Scalar:  # fmt: skip
    scores = softcap * scalars.tanh(scalars.sum_(q * k, _DEPTH) * (scale / softcap))
    scores = _masked(scores, mask, is_causal, lower_right)
    weights = scalars.exp(scores - scalars.amax(scores, _SOURCE))
    return scalars.sum_(weights / scalars.sum_(weights, _SOURCE) * v, _SOURCE)


# -- ATen forms --------------------------------------------------------------------------------------------------------


SCALED_BY = "scaled_by_head_size"
"""Where a node's metadata says of which head size the scale, which was not given, was made."""


def frozen_scale(q: Value, scale: float | None) -> float:
    """The scale that stands for None, as a number."""
    return 1 / math.sqrt(int(q.shape[-1])) if scale is None else float(scale)


def _sdpa(
    build: Builder, q: Value, k: Value, v: Value, attn_mask: Value | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    # equal head counts need no sharing, and then nothing has to be split
    grouped = enable_gqa and not all(same(q.shape[-3], other.shape[-3]) for other in (k, v))
    result: Value = build.attention(
        q, k, v, attn_mask, is_causal=is_causal, scale=frozen_scale(q, scale), enable_gqa=grouped, dropout_p=dropout_p
    )
    if scale is None and result.producer is not None:
        result.producer.metadata[SCALED_BY] = str(q.shape[-1])
    return result


def _flash_cpu(
    build: Builder, q: Value, k: Value, v: Value, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Value | None = None, scale: float | None = None,
) -> Value:  # fmt: skip
    return _sdpa(build, q, k, v, attn_mask, dropout_p, is_causal, scale=scale)


def _flash(
    build: Builder, q: Value, k: Value, v: Value, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> Value:  # fmt: skip
    return _sdpa(build, q, k, v, None, dropout_p, is_causal, scale=scale)


def _efficient(
    build: Builder, q: Value, k: Value, v: Value, attn_bias: Value | None, compute_log_sumexp: bool,
    dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
) -> Value:  # fmt: skip
    return _sdpa(build, q, k, v, attn_bias, dropout_p, is_causal, scale=scale)


def _overrideable(
    build: Builder, q: Value, k: Value, v: Value, attn_bias: Value | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
) -> Value:  # fmt: skip
    return _sdpa(build, q, k, v, attn_bias, dropout_p, is_causal, scale=scale)


def _math(
    build: Builder, q: Value, k: Value, v: Value, attn_mask: Value | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, dropout_mask: Value | None = None, *, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    return _sdpa(build, q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


@operator(
    rule=_attention_rule,
    aten={
        "scaled_dot_product_attention": _sdpa,
        "_scaled_dot_product_flash_attention_for_cpu": _flash_cpu,
        "_scaled_dot_product_flash_attention": _flash,
        "_scaled_dot_product_efficient_attention": _efficient,
        "_scaled_dot_product_cudnn_attention": _efficient,
        "_scaled_dot_product_fused_attention_overrideable": _overrideable,
        "_scaled_dot_product_attention_math": _math,
        "_native_multi_head_attention": native_attention,
        "_transformer_encoder_layer_fwd": native_encoder_layer,
    },
    onnx={
        "Attention": OnnxForm(read=read_attention, write=write_attention),
        "com.microsoft::Attention": OnnxForm(read=read_contrib_attention, write=write_contrib_attention),
        "com.microsoft::MultiHeadAttention": OnnxForm(read=read_multi_head_attention, write=write_attention),
        "RotaryEmbedding": OnnxForm(read=read_rotary, write=write_rotary),
        "com.microsoft::RotaryEmbedding": OnnxForm(read=read_contrib_rotary, write=write_rotary),
    },
    spell=spell_attention,
    spelled_for_torch=spelled_for_torch,
    macs=_macs,
    samples=_samples,
    zeroed_by=("v",),
    scaling=Scaling(powers={"v": 1}, opposed=("q", "k")),
    element=_element,
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    lower_right: bool = False,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    head_size: int | None = None,
) -> torch.Tensor:
    """``head_size`` is the size of d, told apart where a file format would derive the scale from it."""
    if is_causal and lower_right:
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
        if mask is not None:
            seen = seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
        mask, is_causal = seen, False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _capped_samples() -> list[Sample]:
    q, k, v = randn(2, 4, 3, 6), randn(2, 2, 3, 6), randn(2, 2, 3, 2)
    return [
        sample(q, k, v, scale=0.3, softcap=2.0, enable_gqa=True),
        sample(q, q, q, randn(4, 3, 3), scale=0.3, softcap=2.0),
        sample(q, q, q, randn(3, 3) > -1, scale=0.3, softcap=1.5),
        sample(q, q, q, scale=0.3, softcap=1.5, is_causal=True),
        sample(q[:, :, :2], q, q, scale=0.3, softcap=1.5, is_causal=True, lower_right=True),
    ]


@operator(
    rule=_attention_rule,
    macs=_macs,
    samples=_capped_samples,
    zeroed_by=("v",),
    spell=spell_attention,
    scaling=Scaling(powers={"v": 1}, opposed=("q", "k")),
    element=_capped_element,
)
def capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float,
    is_causal: bool = False,
    lower_right: bool = False,
    enable_gqa: bool = False,
    head_size: int | None = None,
) -> torch.Tensor:
    """Attention whose scores are squeezed into (-softcap, softcap) by a tanh before the mask is added."""
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
        v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    scores = softcap * torch.tanh(q @ k.transpose(-2, -1) * (scale / softcap))
    if is_causal:
        first = 1 + (k.shape[-2] - q.shape[-2] if lower_right else 0)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(first)
        scores = scores.masked_fill(later, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1) @ v
