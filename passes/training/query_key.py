"""Query-key reparameterisation: the product of query and key weights in their place, so that it is quantized."""

from __future__ import annotations

from collections import Counter

import torch

from regauge.ir.edit import Builder, record, remove_dead, set_input
from regauge.ir.graph import Graph, Node, Operand, Value
from regauge.passes.attention.sites import Heads, attention_sites
from regauge.passes.quantization.preparation import prepared

NAME = "query-key-products"


def query_key_products(graph: Graph, left: Counter[str] | None = None) -> Graph:
    """A graph that computes the same, in which heads multiply x (Wq' Wk) by x where they multiplied queries by keys.

    Of two factors that are rounded a weight that flips in one moves the best weights of the other, and they oscillate
    together (Liu et al. 2023, Oscillation-free Quantization for Low-bit Vision Transformers, section 4.3): quantize or
    train (``Qat(query_key_products(graph), ...)``) the product instead. Of the biases that of queries stays, as one of
    the product; that of keys adds the same to all scores of a query, which softmax takes away. A head holds channels^2
    weights then in place of 2 size channels. Deviation: the product is trained itself, not through its factors.

    ``left`` counts attentions that stay as they are, by reason: queries or keys that are more than rows of a linear
    layer (rotary positions, norms), shared heads.
    """
    result = prepared(graph).copy()
    left = Counter() if left is None else left
    changed = 0
    for site in attention_sites(result):
        rank = site.node.output.rank
        query, key, value = (part if _are_rows(part, rank) else None for part in (site.query, site.key, site.value))
        if query is None or key is None:
            left["queries or keys are not rows of a linear layer"] += 1
        elif query.count != key.count:
            left["heads are shared"] += 1
        elif not site.keeps_scale:
            left["its file derives the scale from the head size"] += 1
        else:
            _replace(result, site.node, query, key, value)
            changed += 1
    remove_dead(result)
    if changed:
        record(result, NAME, f"{changed} products of queries and keys")
    return result


def _are_rows(part: Heads | None, rank: int) -> bool:
    """Whether attention reads a linear layer's result [..., length, channels] as [..., heads, length, size]."""
    if part is None or not part.is_layout or not part.in_order or part.layer.weight.dtype != torch.float32:
        return False
    return part.layer.node.op in ("linear", "matmul") and part.x.rank + 1 == rank


def _replace(graph: Graph, node: Node, query: Heads, key: Heads, value: Heads | None) -> None:
    product = query.weight.mT @ key.weight  # [heads, channels of queries, channels of keys]
    bias = None if query.bias is None else torch.einsum("hd,hdc->hc", query.bias, key.weight)
    build, label = Builder(graph, by=NAME), query.layer.weight.name
    with build.at(node):
        made = _projected(build, query.x, product.mT, bias, f"{label}_query_key")
        set_input(node, 0, made, graph)
        set_input(node, 1, build.unsqueeze(key.x, dim=key.x.rank - 2), graph)
        if value is not None and value.layer.node in (query.layer.node, key.layer.node) and value.count == query.count:
            set_input(node, 2, _projected(build, value.x, value.weight, value.bias, f"{label}_value"), graph)


def _projected(build: Builder, x: Value, weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> Operand:
    """[..., heads, length, size] of x [..., length, channels], by a weight [heads, size, channels]."""
    heads, size, _ = weight.shape
    w = build.parameter(build.unique(name), weight.flatten(0, 1).float())
    b = None if bias is None else build.parameter(build.unique(f"{name}_bias"), bias.flatten().float())
    parted: Value = build.reshape(build.linear(x, w, b), shape=(*x.shape[:-1], heads, size))
    order = [*range(x.rank - 2), x.rank - 1, x.rank - 2, x.rank]
    found: Value = build.permute(parted, dims=tuple(order))
    return found
