"""Which values of a graph become integers: what layers read, and what kernels on integers hand on to one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from regauge.ir.cost import local_figures
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.name_patterns import matches
from regauge.passes.quantization.targets import Target

_LAYERS = ("linear", "matmul", "conv")
_OPSET_OF_BLOCKS = 21
_DEPTH_OF_SOFTMAX = 30.0
_SMALL_SHARE = 0.02  # of the multiplications of all layers
_MOVES = ("reshape", "permute", "squeeze", "unsqueeze", "slice", "max_pool")  # entries stay what they are


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


def misfit(layer: Layer) -> str | None:
    """Why a layer does not multiply integers; None where it may."""
    if layer.node.op not in _LAYERS:
        return f"{layer.node.op} has no quantized form yet"
    if layer.weight.dtype != torch.float32:
        return "its weight is not in single precision"
    if layer.blocks > 1 and layer.node.op == "matmul":
        return "it is a batch of matrices"
    return None


def misfit_of_weight(layer: Layer) -> str | None:
    """Why the weight of a layer alone is not stored in integers; None where it is."""
    if layer.node.op not in _LAYERS:
        return f"{layer.node.op} has no quantized form yet"
    return "its weight is not in single precision" if layer.weight.dtype != torch.float32 else None


def reads_blocks(graph: Graph, layer: Layer, target: Target, group: int, bits: int) -> bool:
    """Whether a target has a kernel for weights alone of a layer, ``group`` of whose columns share a scale.

    Codes of 8 bits have another form where the file's opset is too old for blocks; those of fewer have none.
    """
    fits = layer.node.op != "conv" and layer.blocks == 1 and layer.columns % group == 0
    return target.blocks_alone and fits and (bits < 8 or _opset(graph) >= _OPSET_OF_BLOCKS)


def _opset(graph: Graph) -> int:
    """That of the ONNX file that a graph was read from; other graphs are written with a new one."""
    model = graph.metadata.get("onnx")
    return _OPSET_OF_BLOCKS if model is None else int(model.opset_imports.get("", 1))


def is_depthwise(layer: Layer) -> bool:
    """Whether each input channel has a filter of its own."""
    return layer.blocks > 1 and layer.columns == layer.taps


def find_tables(graph: Graph, include: Sequence[str], exclude: Sequence[str]) -> list[tuple[Node, Parameter]]:
    """The lookups in tables of vectors that nothing else reads."""
    found = []
    for node in graph.nodes:
        table = node.inputs[0] if node.op == "embedding" else None
        if not isinstance(table, Parameter) or table.kind != "parameter" or table.dtype != torch.float32:
            continue
        chosen = (not include or matches(table.names, include)) and not matches(table.names, exclude)
        if chosen and len(table.uses) == 1 and table not in graph.outputs:
            found.append((node, table))
    return found


def left_in_float(graph: Graph, layers: Sequence[Layer], target: Target) -> dict[Node, str]:
    """The convolutions, with reasons, that are not worth integers for a target.

    A small one whose result nothing reads as integers: its kernel gives integers, which would round it for readers in
    float, and little time is gained. A depthwise one, unless it stands between kernels on integers.
    """
    nodes = {layer.node for layer in layers}
    chained, held = _chains(graph, nodes) if target.chains else {}, _held(graph)
    whole = max(local_figures(nodes, graph).macs, 1)
    found = {}
    for layer in layers:
        node = layer.node
        ends = node.op == "conv" and not _goes_on(tail(node.output, held), nodes, chained, held)
        small = local_figures([node], graph).macs < _SMALL_SHARE * whole
        if is_depthwise(layer) and not target.depthwise and (ends or node.inputs[0] not in chained):
            found[node] = "depthwise convolutions are slower with integers"
        elif ends and small and target.chains:
            found[node] = "a small convolution whose result is read in float"
    return found


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


def readers_in(value: Value, layers: Sequence[Layer]) -> tuple[list[Layer], list[Layer]]:
    """The layers that read a value, of a single block, and the depthwise convolutions beside them.

    None at all where some are convolutions and others are not: their channels lie on different axes.
    """
    own = [layer for layer in layers if layer.node.inputs[0] is value and layer.blocks == 1]
    others = [layer_of(node, blocks=True) for node in value.consumers() if all(node is not one.node for one in own)]
    beside = [layer for layer in others if layer is not None and is_depthwise(layer) and layer.outputs == 1]
    beside = [layer for layer in beside if layer.node.inputs[0] is value and layer.weight.shape[1] == 1]
    kinds = {layer.node.op == "conv" for layer in [*own, *beside]}
    return (own, beside) if len(kinds) == 1 else ([], [])


def depth_of(graph: Graph, value: Value, placement: Placement) -> float | None:
    """How far below its greatest entry a value matters: where all that reads it is a softmax, exp(-30) is nothing.

    A mask adds numbers such as -1e9, between which and 0 a grid would have one step for everything else.
    """
    moved = [other for other, source in placement.chained.items() if source is value] or [value]
    readers = [node for other in moved for node in other.consumers() if node.op not in _MOVES]
    inside = readers and _held(graph).isdisjoint(moved)
    return _DEPTH_OF_SOFTMAX if inside and all(node.op == "softmax" for node in readers) else None


def tail(value: Value, held: set[Value]) -> Value:
    """The result of the clamp at zero that alone reads a value: kernels on integers clamp by rounding."""
    readers = value.consumers()
    if len(readers) == 1 and value not in held:
        node = readers[0]
        if node.op == "relu" or node.op == "hardtanh" and node.attributes["min_val"] == 0:
            return node.output
    return value


def _chains(graph: Graph, layers: set[Node]) -> dict[Value, Value]:
    held = _held(graph)
    chained: dict[Value, Value] = {}
    for node in graph.nodes:
        if node.op == "conv" and node in layers or _joins(node, chained) or _averages(graph, node, chained):
            end = tail(node.output, held)
            chained[end] = end
        elif node.op in _MOVES and node.inputs[0] in chained and len(node.outputs) == 1:
            chained[node.output] = chained[node.inputs[0]]
    for value in reversed(list(chained)):
        assert value.producer is not None
        firm = chained[value] is value and _kernel(value) in layers
        if not firm and not _goes_on(value, layers, chained, held):
            del chained[value]  # nothing goes on with integers from here
    return chained


def _held(graph: Graph) -> set[Value]:
    """What is read from outside the graph."""
    held = {output for output in graph.outputs if isinstance(output, Value)}
    return held | {value for state in graph.states for value in (state.before, state.after)}


def _goes_on(value: Value, layers: set[Node], chained: dict[Value, Value], held: set[Value]) -> bool:
    """Whether a reader of a value takes integers."""
    return any(node in layers or _given(node, held) in chained for node in value.consumers())


def _joins(node: Node, chained: dict[Value, Value]) -> bool:
    """Whether a node joins integers, or adds those of one shape."""
    operands = [value for _, value in node.operands()]
    if len(operands) < 2 or not all(value in chained for value in operands):
        return False
    return node.op == "concat" or node.op == "add" and len({value.shape for value in operands}) == 1


def _averages(graph: Graph, node: Node, chained: dict[Value, Value]) -> bool:
    """Whether a node gives the mean of all places of integers, in a file: torch's exporter writes it as a reduction,
    which has no kernel on them."""
    if "onnx" not in graph.metadata:
        return False
    whole = node.op == "adaptive_avg_pool" and all(size == 1 for size in node.attributes["output_size"])
    return whole and node.inputs[0] in chained


def _kernel(value: Value) -> Node | None:
    """The node whose kernel gives a value, a clamp behind it aside."""
    node = value.producer
    if node is not None and node.op in ("relu", "hardtanh") and isinstance(node.inputs[0], Value):
        return node.inputs[0].producer
    return node


def _given(node: Node, held: set[Value]) -> Value | None:
    """What a kernel gives, a clamp behind it included."""
    return tail(node.outputs[0], held) if len(node.outputs) == 1 else None
