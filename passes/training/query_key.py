"""Query-key reparameterisation: the product of query and key weights in their place, so that it is quantized."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from regauge.ir.edit import Builder, record, remove_dead, set_input
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.operator import Symmetry, symmetry_of
from regauge.ir.sizes import Size, evaluate, prime_hints, symbols_in
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.quantization.preparation import prepared

NAME = "query-key-products"


@dataclass
class Heads:
    """What attention reads, [..., heads, length, size], as rows [heads, size] of the weight of a linear layer."""

    layer: Layer
    rows: torch.Tensor

    @property
    def x(self) -> Value:
        """What the layer reads, [..., length, channels]."""
        value = self.layer.node.inputs[0]
        assert isinstance(value, Value)
        return value

    @property
    def weight(self) -> torch.Tensor:
        """[heads, size, channels]"""
        return self.layer.matrix(self.layer.weight.tensor.detach()).double()[self.rows]

    @property
    def bias(self) -> torch.Tensor | None:
        """[heads, size]"""
        return None if self.layer.bias is None else self.layer.bias.tensor.detach().double()[self.rows]


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
    for node in [node for node in result.nodes if node.op == "attention"]:
        query, key, value = (_heads(operand) for operand in node.inputs[:3])
        if query is None or key is None:
            left["queries or keys are not rows of a linear layer"] += 1
        elif node.attributes["enable_gqa"] or len(query.rows) != len(key.rows):
            left["heads are shared"] += 1
        elif node.attributes["head_size"] is not None:
            left["its file derives the scale from the head size"] += 1
        else:
            _replace(result, node, query, key, value)
            changed += 1
    remove_dead(result)
    if changed:
        record(result, NAME, f"{changed} products of queries and keys")
    return result


def _replace(graph: Graph, node: Node, query: Heads, key: Heads, value: Heads | None) -> None:
    product = query.weight.mT @ key.weight  # [heads, channels of queries, channels of keys]
    bias = None if query.bias is None else torch.einsum("hd,hdc->hc", query.bias, key.weight)
    build, label = Builder(graph, by=NAME), query.layer.weight.name
    with build.at(node):
        made = _projected(build, query.x, product.mT, bias, f"{label}_query_key")
        set_input(node, 0, made, graph)
        set_input(node, 1, build.unsqueeze(key.x, dim=key.x.rank - 2), graph)
        if value is not None and value.layer.node in (query.layer.node, key.layer.node):
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


def _heads(operand: Operand) -> Heads | None:
    """Found by laying out numbered entries as the nodes between the layer and attention do; None for anything else."""
    path: list[Node] = []
    value = operand
    while isinstance(value, Value) and value.producer is not None and value.producer.op != "linear":
        node = value.producer
        if symmetry_of(node) is not Symmetry.LAYOUT or len([v for _, v in node.operands()]) != 1:
            return None
        path.append(node)
        value = node.inputs[0]
    producer = value.producer if isinstance(value, Value) else None
    layer = layer_of(producer) if producer is not None else None
    if layer is None or layer.weight.dtype != torch.float32 or not isinstance(operand, Value):
        return None
    assert isinstance(value, Value)
    return _traced(layer, value, operand, path[::-1])


def _traced(layer: Layer, given: Value, read: Value, path: list[Node]) -> Heads | None:
    if read.rank != given.rank + 1 or isinstance(read, Parameter):
        return None
    hints = prime_hints(symbols_in((given.shape, *(tuple(n.attributes.values()) for n in path))))
    shape: tuple[Size, ...] = evaluate(given.shape, hints)
    held = {given: torch.arange(int(torch.Size(shape).numel())).reshape(shape)}
    for node in path:
        attributes = {key: evaluate(attribute, hints) for key, attribute in node.attributes.items()}
        results = node.operator.evaluate(held[node.inputs[0]], **attributes)  # type: ignore[index]
        results = results if isinstance(results, tuple | list) else (results,)
        held.update(zip(node.outputs, results, strict=True))
    found, channels = held[read], int(shape[-1])
    rows = found.select(-2, 0).reshape(-1, found.shape[-3], found.shape[-1])[0] % channels
    positions = torch.arange(int(torch.Size(shape[:-1]).numel())).reshape(shape[:-1])
    expected = positions.unsqueeze(-2)[..., None] * channels + rows[:, None, :]
    return Heads(layer, rows) if found.shape == expected.shape and bool((found == expected).all()) else None
