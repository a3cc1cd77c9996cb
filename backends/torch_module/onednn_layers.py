"""Layers of a graph that run on kernels of oneDNN, with the activations behind them: see torch_onednn.py.

    y = gelu(linear(x, w, b))    PackedLinear(in, out, activation='gelu')
    y = relu(conv(x, w))         PackedConv2d(in, out, kernel_size=3, bias=False, activation='relu')

On a copy of the graph; each layer is a node ``linear`` or ``conv``, which says in its metadata what it is.
"""

from __future__ import annotations

from collections.abc import Container

import torch

from regauge.ir.edit import remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.graph_copy import copy_graph
from regauge.ir.training_notes import LAYER

_CLASSES = {"linear": ("nn.Linear(", "PackedLinear("), "conv": ("nn.Conv2d(", "PackedConv2d(")}
_ACTIVATIONS = ("relu", "sigmoid", "tanh", "silu", "hardswish", "hardsigmoid", "gelu")


def as_onednn_layers(graph: Graph, without: Container[str]) -> tuple[Graph, dict[str, str]]:
    """A graph with the same inputs and results, and the layers by the name of their weight; not those ``without``."""
    result = copy_graph(graph)
    found = {}
    for node in list(result.nodes):
        weight = node.inputs[1] if node.op in _CLASSES else None
        if isinstance(weight, Parameter) and weight.name not in without and (text := _layer(node)) is not None:
            activation = _activation_behind(result, node)
            if activation is not None:
                text = f"{text[:-1]}, activation={_name(activation)!r})"
                replace_uses(result, activation.output, node.output)
                remove_node(result, activation)
            node.metadata[LAYER] = found[weight.name] = text
    return result, found


def _layer(node: Node) -> str | None:
    """The source of a layer of float32 whose weight nothing else reads; None where the node is no such layer."""
    values = [value for _, value in node.operands()]
    alone = all(len(value.uses) == 1 for value in values if isinstance(value, Parameter))
    if node.operator.layer is None or not alone or any(value.dtype != torch.float32 for value in values):
        return None
    before, after = _CLASSES[node.op]
    text = node.operator.layer(node)
    return after + text[len(before) :] if text is not None and text.startswith(before) else None


def _activation_behind(graph: Graph, node: Node) -> Node | None:
    """The activation that alone reads what a layer gives."""
    held = any(output is node.output for output in graph.outputs) or any(
        node.output in (state.before, state.after) for state in graph.states
    )
    readers = [user for user, _ in node.output.uses]
    if held or len(readers) != 1 or readers[0].op not in _ACTIVATIONS or len(readers[0].inputs) != 1:
        return None
    reader = readers[0]
    inside = reader in graph.nodes and isinstance(reader.inputs[0], Value)
    return reader if inside and reader.output.dtype == torch.float32 else None


def _name(activation: Node) -> str:
    return "gelu_tanh" if activation.attributes.get("approximate") == "tanh" else activation.op
