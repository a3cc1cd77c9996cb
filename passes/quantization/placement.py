"""Which values of a graph become integers: what layers read, and what kernels on integers hand on to one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.name_patterns import check_patterns, matches
from regauge.passes.quantization.targets import Target

_LAYERS = ("linear", "matmul", "conv")
_MOVES = ("reshape", "permute", "squeeze", "unsqueeze", "slice", "max_pool")  # entries stay what they are


def find_tables(
    graph: Graph, include: Sequence[str], exclude: Sequence[str], left: Counter[str]
) -> list[tuple[Node, Parameter]]:
    """The lookups in tables of vectors that nothing else reads."""
    found = []
    for node in graph.nodes:
        table = node.inputs[0] if node.op == "embedding" else None
        if not isinstance(table, Parameter) or table.kind != "parameter" or table.dtype != torch.float32:
            continue
        if (include and not matches(table.names, include)) or matches(table.names, exclude):
            continue
        if len(table.uses) > 1 or table in graph.outputs:
            left["its table of vectors has other readers"] += 1
        else:
            found.append((node, table))
    return found


@dataclass
class Placement:
    """Layers to compute with integers, and the values that are quantized for it.

    ``chained`` values are given by kernels on integers, or moved by others: all who read them read integers. Of the
    value on the right they have the scale. ``fed`` ones come from elsewhere; of those who read them only layers do.
    """

    layers: list[Layer]
    chained: dict[Value, Value] = field(default_factory=dict)
    fed: list[Value] = field(default_factory=list)

    @property
    def measured(self) -> list[Value]:
        """The values whose ranges are needed."""
        return list(dict.fromkeys([*self.chained.values(), *self.fed]))


def find_layers(
    graph: Graph, include: Sequence[str], exclude: Sequence[str], left: Counter[str], *, depthwise: bool = True
) -> list[Layer]:
    """The layers to quantize, in the order of the graph; ``left`` counts the others by reason.

    Globs are on names of weights. Raises PassError for one that matches none.
    """
    every = [name for parameter in graph.all_parameters() for name in parameter.names]
    check_patterns("include", include, every)
    check_patterns("exclude", exclude, every)
    found = []
    for owner, node in graph.walk():
        if node.op not in _LAYERS or len(node.inputs) < 2:
            continue
        layer, weight = layer_of(node, blocks=True), node.inputs[1]
        reason = _reason(owner is graph, weight, layer, include, exclude, depthwise)
        if reason:
            left[reason] += 1
        elif layer is not None:
            found.append(layer)
    return found


def _reason(
    outermost: bool,
    weight: object,
    layer: Layer | None,
    include: Sequence[str],
    exclude: Sequence[str],
    depthwise: bool,
) -> str | None:
    if not isinstance(weight, Parameter):
        return None  # a product of two activations
    if include and not matches(weight.names, include):
        return "not included"
    if matches(weight.names, exclude):
        return "excluded"
    if not outermost:
        return "it lies in a branch or the body of a loop"
    if layer is None:
        return "its weight has other readers, or is no matrix of weights" if weight.kind == "parameter" else None
    if weight.dtype != torch.float32:
        return "its weight is not in single precision"
    if layer.blocks > 1 and layer.node.op == "matmul":
        return "it is a batch of matrices"
    if not depthwise and is_depthwise(layer):
        return "depthwise convolutions are slower with integers"
    return None


def is_depthwise(layer: Layer) -> bool:
    """Whether each input channel has a filter of its own."""
    return layer.blocks > 1 and layer.columns == layer.taps


def place(graph: Graph, layers: Sequence[Layer], target: Target) -> Placement:
    """Where integers begin and end."""
    placement = Placement(list(layers))
    nodes = {layer.node for layer in layers}
    if target.chains:
        placement.chained = _chains(graph, nodes)
    for layer in layers:
        x = layer.node.inputs[0]
        assert isinstance(x, Value)
        if x not in placement.chained and x not in placement.fed:
            placement.fed.append(x)
    return placement


def tail(value: Value, held: set[Value]) -> Value:
    """The result of the clamp at zero that alone reads a value: kernels on integers clamp by rounding."""
    readers = value.consumers()
    if len(readers) == 1 and value not in held:
        node = readers[0]
        if node.op == "relu" or node.op == "hardtanh" and node.attributes["min_val"] == 0:
            return node.output
    return value


def _chains(graph: Graph, layers: set[Node]) -> dict[Value, Value]:
    held = {output for output in graph.outputs if isinstance(output, Value)}
    held |= {value for state in graph.states for value in (state.before, state.after)}
    chained: dict[Value, Value] = {}
    for node in graph.nodes:
        if node.op == "conv" and node in layers or _joins(node, chained):
            end = tail(node.output, held)
            chained[end] = end
        elif node.op in _MOVES and node.inputs[0] in chained and len(node.outputs) == 1:
            chained[node.output] = chained[node.inputs[0]]
    for value in reversed(list(chained)):
        assert value.producer is not None
        firm = chained[value] is value and _kernel(value) in layers
        if not firm and not any(node in layers or _given(node, held) in chained for node in value.consumers()):
            del chained[value]  # nothing goes on with integers from here
    return chained


def _joins(node: Node, chained: dict[Value, Value]) -> bool:
    """Whether a node adds or joins integers, all of them of the same shape."""
    operands = [value for _, value in node.operands()]
    if len(operands) < 2 or not all(value in chained for value in operands):
        return False
    return node.op == "concat" or node.op == "add" and len({value.shape for value in operands}) == 1


def _kernel(value: Value) -> Node | None:
    """The node whose kernel gives a value, a clamp behind it aside."""
    node = value.producer
    if node is not None and node.op in ("relu", "hardtanh") and isinstance(node.inputs[0], Value):
        return node.inputs[0].producer
    return node


def _given(node: Node, held: set[Value]) -> Value | None:
    """What a kernel gives, a clamp behind it included."""
    return tail(node.outputs[0], held) if len(node.outputs) == 1 else None
