"""How new attention nodes are spelled in ONNX: Attention of opset 23, else products, a mask and a softmax."""

from __future__ import annotations

import math
from typing import Any

import torch

from regauge.ir.dims.mask_values import is_finite, keeps_a_key
from regauge.ir.graph import Node, Value
from regauge.ir.sizes.expressions import Size, at_least, divide, same

ATTENTION_OPSET = 23


def spell_attention(onnx: Any, node: Node) -> Any:
    q, k, v = (_tensor(node, slot) for slot in range(3))
    if node.attributes.get("dropout_p"):
        raise onnx.refusal("attention with dropout draws random numbers")
    softcap, causal = node.attributes.get("softcap"), node.attributes["is_causal"]
    plain = q.rank == k.rank == v.rank == 4 and all(same(q.shape[0], other.shape[0]) for other in (k, v))
    heads = node.attributes["enable_gqa"] or all(same(q.shape[1], other.shape[1]) for other in (k, v) if plain)
    masked = masks_rows(node)
    if onnx.opset >= ATTENTION_OPSET and plain and heads and not causal and not softcap and not masked:
        return onnx.Attention(*onnx.operands(4), scale=float(node.attributes["scale"]))
    keys, values = onnx.operands(3)[1:]
    if node.attributes["enable_gqa"]:
        keys, values = _shared(onnx, q, k, keys), _shared(onnx, q, v, values)
    turned = onnx.Transpose(keys, perm=(*range(k.rank - 2), k.rank - 1, k.rank - 2))
    scores = onnx.MatMul(onnx.Mul(onnx.operand(0), float(node.attributes["scale"])), turned)
    if softcap:
        scores = onnx.Mul(onnx.Tanh(onnx.Div(scores, float(softcap))), float(softcap))
    if causal:
        seen = _not_later(onnx, q.shape[-2], k.shape[-2], lower_right=node.attributes["lower_right"])
        scores = onnx.Where(seen, scores, -math.inf)
    if onnx.given(3):
        mask = onnx.operand(3)
        boolean = _tensor(node, 3).dtype == torch.bool
        scores = onnx.Where(mask, scores, -math.inf) if boolean else onnx.Add(scores, mask)
    if onnx.opset < 13 and max(q.rank, k.rank) != node.outputs[0].rank:
        raise onnx.refusal("Softmax joins axes before opset 13")
    weights = onnx.Softmax(scores, axis=node.outputs[0].rank - 1)
    if masked:
        weights = onnx.Where(onnx.IsNaN(weights), 0.0, weights)
    return onnx.MatMul(weights, values)


def masks_rows(node: Node) -> bool:
    """Whether the mask may leave nothing of a row: attention gives zero there, a softmax of minus infinity NaN."""
    if node.attributes["is_causal"] and node.attributes["lower_right"]:
        if not at_least(_tensor(node, 1).shape[-2] - _tensor(node, 0).shape[-2], 0):
            return True
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if not isinstance(mask, Value) or (mask.dtype != torch.bool and is_finite(mask)):
        return False
    return node.attributes["is_causal"] or not keeps_a_key(mask)


def spelled_for_torch(node: Node) -> bool:
    """Where a row may be hidden torch's exporter writes NaN, or for truth values the mean of all that is hidden."""
    return masks_rows(node) and not node.attributes["dropout_p"]


def _tensor(node: Node, slot: int) -> Value:
    value = node.inputs[slot]
    assert isinstance(value, Value)
    return value


def _shared(onnx: Any, q: Value, other: Value, given: Any) -> Any:
    """Every head of k or v for the r query heads that share it: ``... h s d -> ... (h r) s d``."""
    copies = divide(q.shape[-3], other.shape[-3])
    if not isinstance(copies, int):
        raise onnx.refusal(f"{q.shape[-3]} query heads share {other.shape[-3]} others")
    if copies == 1:
        return given
    place = other.rank - 2
    repeats = [copies if axis == place else 1 for axis in range(other.rank + 1)]
    spread = onnx.Tile(onnx.unsqueeze(given, place), onnx.sizes(repeats))
    shape = (*other.shape[:-3], q.shape[-3], *other.shape[-2:])
    return onnx.Reshape(spread, onnx.target(shape, other.shape[:-3]))


def _not_later(onnx: Any, length: Size, source: Size, *, lower_right: bool) -> Any:
    """True where key j may be seen by query i: ``j <= i``, or as many more as there are more keys than queries; of
    dynamic sizes found when it runs."""
    if isinstance(length, int) and isinstance(source, int):
        first = source - length if lower_right else 0
        return onnx.constant(torch.ones(length, source, dtype=torch.bool).tril(first))
    zero, step = onnx.constant(torch.tensor(0)), onnx.constant(torch.tensor(1))
    queries, keys = (onnx.squeeze(onnx.sizes([size]), 0) for size in (length, source))
    rows = (onnx.Sub(keys, queries), keys) if lower_right else (zero, queries)
    i, j = onnx.Range(*rows, step), onnx.Range(zero, keys, step)
    return onnx.Not(onnx.Greater(j, onnx.unsqueeze(i, 1)))
