"""The fused transformer operators of torch (the fast paths of its attention and encoder layers), taken apart."""

from __future__ import annotations

import math
from typing import Any

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import Size


def _keep_mask(build: Builder, mask: Value | None, mask_type: int | None, batch: Size, source: Size) -> Value | None:
    """Which scores take part: the fused operators mark what does not, per (l, s), per (batch, s), or per score."""
    if mask is None:
        return None
    marked = mask if mask.dtype == torch.bool else build.ne(mask, 0)
    if mask_type == 1:
        marked = build.reshape(marked, shape=(batch, 1, 1, source))
    return build.logical_not(marked)  # type: ignore[no-any-return]


def _in_heads(build: Builder, x: Value, heads: int) -> Value:
    """``b s (h d) -> b h s d``"""
    batch, length, width = x.shape
    split = build.reshape(x, shape=(batch, length, heads, int(width) // heads))
    return build.permute(split, dims=(0, 2, 1, 3))  # type: ignore[no-any-return]


def _projected(build: Builder, tensors: list[Value], weight: Value, bias: Value, width: int) -> list[Value]:
    """q, k and v by one linear layer where all three come from one tensor, else by a third of it each."""
    if tensors[0] is tensors[1] is tensors[2]:
        joint = build.linear(tensors[0], weight, bias)
        return list(build.split(joint, sizes=(width,) * 3, dim=2))
    weights = build.split(weight, sizes=(width,) * 3, dim=0)
    biases = build.split(bias, sizes=(width,) * 3, dim=0)
    return [build.linear(x, w, b) for x, w, b in zip(tensors, weights, biases, strict=True)]


def native_attention(
    build: Builder, query: Value, key: Value, value: Value, embed_dim: int, num_head: int, qkv_weight: Value,
    qkv_bias: Value, proj_weight: Value, proj_bias: Value, mask: Value | None = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: int | None = None,
) -> Any:  # fmt: skip
    """``_native_multi_head_attention``: projections, attention, output projection, and the weights where wanted."""
    projected = _projected(build, [query, key, value], qkv_weight, qkv_bias, embed_dim)
    q, k, v = (_in_heads(build, x, num_head) for x in projected)
    keep = _keep_mask(build, mask, mask_type, query.shape[0], key.shape[1])
    scale = 1 / math.sqrt(embed_dim // num_head)
    mixed = build.permute(build.attention(q, k, v, keep, scale=scale), dims=(0, 2, 1, 3))
    joined = build.reshape(mixed, shape=(*query.shape[:2], embed_dim))
    result = build.linear(joined, proj_weight, proj_bias)
    if not need_weights:
        return result, None
    scores = build.mul(build.matmul(q, build.permute(k, dims=(0, 1, 3, 2))), scale)
    if keep is not None:
        scores = build.where(keep, scores, float("-inf"))
    weights = build.softmax(scores, dim=3)
    return result, build.mean(weights, dims=(1,), keepdim=False) if average_attn_weights else weights


def native_encoder_layer(
    build: Builder, src: Value, embed_dim: int, num_heads: int, qkv_weight: Value, qkv_bias: Value, proj_weight: Value,
    proj_bias: Value, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Value, norm_bias_1: Value,
    norm_weight_2: Value, norm_bias_2: Value, ffn_weight_1: Value, ffn_bias_1: Value, ffn_weight_2: Value,
    ffn_bias_2: Value, mask: Value | None = None, mask_type: int | None = None,
) -> Value:  # fmt: skip
    """``_transformer_encoder_layer_fwd``: attention and feed-forward blocks, normalised before or after each."""

    def attend(x: Value) -> Value:
        projections = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        found: Value = native_attention(
            build, x, x, x, embed_dim, num_heads, *projections, mask, need_weights=False, mask_type=mask_type
        )[0]
        return found

    def feed_forward(x: Value) -> Value:
        hidden = build.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = build.gelu(hidden) if use_gelu else build.relu(hidden)
        return build.linear(hidden, ffn_weight_2, ffn_bias_2)  # type: ignore[no-any-return]

    def normalise(x: Value, weight: Value, bias: Value) -> Value:
        return build.layer_norm(x, weight, bias, normalized_shape=(embed_dim,), eps=eps)  # type: ignore[no-any-return]

    if norm_first:
        x = build.add(src, attend(normalise(src, norm_weight_1, norm_bias_1)))
        return build.add(x, feed_forward(normalise(x, norm_weight_2, norm_bias_2)))  # type: ignore[no-any-return]
    x = normalise(build.add(src, attend(src)), norm_weight_1, norm_bias_1)
    return normalise(build.add(x, feed_forward(x)), norm_weight_2, norm_bias_2)
