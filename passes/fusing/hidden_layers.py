"""Hidden layers: what lies between one input and a layer that contracts hidden units, each unit for itself.

h = act(up x + b)    or    h = act(gate x) * (up x)        y = down h + c

Layers are ``linear``, or ``matmul`` with a weight, whose bias a node of its own may add, as in ONNX files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from regauge.ir.axis_rules.rules import is_pointwise
from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.dims.reorder import may_be_reordered
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.depth.parts import Order


@dataclass(frozen=True)
class HiddenLayer:
    """Layers ``ups`` that read ``source``, nodes ``between`` for each unit by itself, and ``down`` behind them."""

    dim: Dim
    source: Value
    ups: tuple[Layer, ...]
    between: tuple[Node, ...]
    down: Layer

    @property
    def units(self) -> int:
        return int(self.dim.size)


def hidden_layers(graph: Graph, left: Counter[str]) -> list[HiddenLayer]:
    """All hidden layers of linear layers; ``left`` counts the linear layers of free units that are none, by reason."""
    order = Order(graph)
    groups = {group.dim: group for group in graph.groups() if group.free}
    free = set(may_be_reordered(graph, groups))
    found = []
    for node in order.nodes:
        layer = _plain(node)
        if layer is None:
            continue
        dims = leaves(graph.axes.of[layer.weight][layer.contracted])
        if len(dims) != 1 or dims[0] not in free:
            continue
        own = _hidden(order, layer, dims[0], {member.parameter for member in groups[dims[0]].members})
        if isinstance(own, HiddenLayer):
            found.append(own)
        else:
            left[own] += 1
    return found


def _plain(node: Node) -> Layer | None:
    """The layer of one matrix that a node is, if it is one."""
    layer = layer_of(node) if node.op in ("linear", "matmul") else None
    return layer if layer is not None and layer.blocks == 1 else None


def _hidden(order: Order, down: Layer, dim: Dim, members: set[Parameter]) -> HiddenLayer | str:
    hidden = down.node.inputs[0]
    assert isinstance(hidden, Value)
    nodes = order.needed_by([hidden])
    layers = [layer for node in nodes if (layer := _plain(node)) is not None]
    ups = [layer for layer in layers if layer.weight in members]
    if not ups or hidden in order.held:
        return "no linear layer makes its units alone"
    first = order.position[ups[0].node]
    between = [n for n in nodes if order.position[n] > first and n not in {layer.node for layer in ups}]
    sources = {layer.node.inputs[0] for layer in ups}
    if len(sources) != 1:
        return "its units are made of several inputs"
    (source,) = sources
    assert isinstance(source, Value)
    vectors = {v for node in between for _, v in node.operands() if isinstance(v, Parameter) and v in members}
    held = vectors | {value for layer in (*ups, down) for value in (layer.weight, layer.bias) if value is not None}
    if members - held:
        return "something besides linear layers has its units"
    inside = {layer.node.output for layer in ups} | {value for node in between for value in node.outputs}
    for node in between:
        operands = [value for _, value in node.operands() if not _is_bias(node, value, hidden)]
        if (
            not (is_pointwise(node) or node.op == "dropout")  # which draws each unit by itself
            or not set(operands) <= inside
            or any(v.shape != hidden.shape for v in (*operands, *node.outputs))
        ):
            return f"{node.op} stands between"
    return HiddenLayer(dim, source, tuple(ups), tuple(between), down)


def _is_bias(node: Node, value: Value, hidden: Value) -> bool:
    return node.op == "add" and isinstance(value, Parameter) and value.shape == hidden.shape[-1:]
