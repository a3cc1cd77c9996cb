"""What is done to a graph before its weights are scaled, rotated or rounded: norms folded, layers put together."""

from __future__ import annotations

from regauge.ir.edit import Builder, set_input
from regauge.ir.graph import Graph, Node, Parameter
from regauge.passes.base import Context
from regauge.passes.simplify.simplify import Simplify


def prepared(graph: Graph) -> Graph:
    """The graph with norms folded into layers, and linear layers put together; the same function.

    Projections stay apart: joined ones would have axes, and ranges, in common.
    """
    for step in (Simplify(skip=("projections",)), Simplify(only=("assemble-linear", "dead-code"))):
        graph = step.call(graph, Context())
    return graph


def with_biases_apart(graph: Graph, *, by: str) -> Graph:
    """A copy, in which layers with weights of their own have biases of their own, too; the same function.

    What makes up for rounding goes into the bias of one layer, and its integers count steps of that layer's products.
    """
    result = graph.copy()
    build, nodes = Builder(result, by=by), set(result.nodes)
    for bias in list(result.parameters.values()):
        if bias.kind != "parameter" or len(bias.uses) < 2:
            continue
        readers = [(node, slot) for node, slot in bias.uses if slot == 2 and node in nodes and _is_layer(node)]
        whole = bias not in result.outputs and len(readers) == len(bias.uses)
        for node, slot in readers[1:] if whole else readers:
            name = build.unique(bias.name)
            own = build.parameter(name, bias.tensor.detach().clone(), trainable=bias.trainable)
            set_input(node, slot, own, result)
    return result


def _is_layer(node: Node) -> bool:
    weight = node.inputs[1]
    return node.op in ("linear", "conv", "conv_transpose") and isinstance(weight, Parameter) and len(weight.uses) == 1
