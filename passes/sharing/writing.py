"""Writes shared layers into the graph: one parameter with several readers, and plain operators around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.ir.edit import Builder, record, replace_uses, set_input, set_weight, tie
from regauge.ir.graph import Graph, Parameter, Value
from regauge.passes.calibration.layers import Layer
from regauge.passes.factorization.chains import Link, weight_like
from regauge.passes.factorization.problems import places


def write_tied(graph: Graph, layers: Sequence[Layer], matrix: torch.Tensor, *, by: str) -> None:
    """Let layers read one weight, the first one's."""
    first = layers[0].weight
    set_weight(graph, first, layers[0].stored(matrix), by=by)
    for layer in layers[1:]:
        tie(graph, first, layer.weight)
    record(graph, by, f"{first.name}: shared by {len(layers)} layers")


def tie_rest(graph: Graph, names: Sequence[Sequence[str]], *, by: str) -> None:
    """Let blocks share the mean of each trained weight that is still their own: norms, biases, tables.

    ``names`` are those of the blocks' own weights, in corresponding order.
    """
    for role in zip(*names, strict=True):
        weights = [graph.parameters[name] for name in role if name in graph.parameters]
        if len(weights) == len(names) and weights[0].kind == "parameter":
            mean = torch.stack([weight.tensor.detach().double() for weight in weights]).mean(0)
            set_weight(graph, weights[0], mean.to(weights[0].dtype), by=by)
            for weight in weights[1:]:
                tie(graph, weights[0], weight)
            record(graph, by, f"{weights[0].name}: shared by {len(weights)} blocks")


def write_residual(graph: Graph, layer: Layer, links: Sequence[Link], *, by: str) -> None:
    """Add a chain of small layers to what a layer gives, on the same input.

    before  y = linear(x, w, b)
    after   y = linear(x, w, b) + linear(linear(x, w_down), w_up)
    """
    node, build = layer.node, Builder(graph, by=by)
    with build.at(node):
        outside, value = around(layer), node.inputs[0]
        for link in links:
            name = f"{stem(layer)}_{link.name}"
            weight = weight_like(build, f"{name}.weight", link.weight, layer.weight)
            build.scope = (*outside, *((name, kind) for _, kind in node.scope[len(outside) :]))
            value = build(link.op, value, weight, name=f"{node.output.name}_{link.name}", **link.attributes)
        build.scope = outside
        total = build.add(node.output, value, name=f"{node.output.name}_sum")
    replace_uses(graph, node.output, total)
    set_input(total.producer, 0, node.output, graph)
    record(graph, by, f"{stem(layer)}: a residual of rank {links[0].weight.shape[0]}")


def write_mixture(
    graph: Graph, layers: Sequence[Layer], atoms: torch.Tensor, mixtures: Sequence[torch.Tensor], *, by: str
) -> None:
    """Let layers be mixtures of common atoms [count, outputs, columns]; ``mixtures`` are [count] for each.

    before  y = linear(x, w, b)
    after   y = linear(x, reshape(matmul(c, atoms)), b)     atoms: f32[count, outputs * columns], c: f32[1, count]

    Where so few rows pass through, for sure, that it is cheaper, each is multiplied by every atom and then mixed.
    """
    build, first = Builder(graph, by=by), layers[0]
    stored = torch.stack([first.stored(atom) for atom in atoms])
    table = weight_like(build, f"{stem(first)}_atoms", stored.flatten(1), first.weight)
    for layer, mixture in zip(layers, mixtures, strict=True):
        own = weight_like(build, f"{stem(layer)}_mixture", mixture[None], layer.weight)
        with build.at(layer.node):
            build.scope = around(layer)
            if _mixed_after(graph, layer, len(atoms)):
                replace_uses(graph, layer.node.output, _mixed_results(build, layer, own, table))
            else:
                name = layer.node.output.name
                flat = build.matmul(own, table, name=f"{name}_mixed")
                weight = build.reshape(flat, shape=tuple(layer.weight.shape), name=f"{name}_weight")
                set_input(layer.node, 1, weight, graph)
        record(graph, by, f"{layer.weight.name}: a mixture of {len(atoms)}")


def _mixed_after(graph: Graph, layer: Layer, count: int) -> bool:
    """Whether fewer numbers are multiplied where results are mixed than where matrices are."""
    shape = layer.node.output.shape
    if layer.node.op != "linear" or not all(isinstance(size, int) for size in shape):
        return False
    rows, entries = places(graph, layer.node.output, -1), layer.outputs * layer.columns
    return count * rows * (entries + layer.outputs) < (count + rows) * entries


def _mixed_results(build: Builder, layer: Layer, own: Parameter, table: Parameter) -> Value:
    """The result of a linear layer, mixed from those of all atoms."""
    node, count = layer.node, int(table.shape[0])
    rows = tuple(node.output.shape[:-1])
    wide = build.reshape(table, shape=(count * layer.outputs, layer.columns))
    results = build.reshape(build.linear(node.inputs[0], wide), shape=(*rows, count, layer.outputs))
    found: Value = build.reshape(build.matmul(own, results), shape=(*rows, layer.outputs))
    return found if layer.bias is None else build.add(found, layer.bias)


def stem(layer: Layer) -> str:
    """The module of a layer."""
    return layer.weight.name.removesuffix(".weight")


def around(layer: Layer) -> tuple[tuple[str, str], ...]:
    """The modules around that of a layer."""
    scope = layer.node.scope
    return scope[:-1] if scope and scope[-1][0] == stem(layer) else scope
