"""Layers of a graph that read quantized weights, and the runtime that they were laid out for."""

from __future__ import annotations

from regauge.ir.graph import Graph, Node, Parameter, Value

PLANNED_FOR = "quantized_for"  # in graph.metadata: the target of the pass that chose where integers begin and end
_LAYERS = ("linear", "matmul", "conv", "conv_transpose")


def planned_for_onnxruntime(graph: Graph) -> bool:
    """Whether a graph was quantized for one of the targets that onnxruntime runs."""
    return str(graph.metadata.get(PLANNED_FOR, "")).startswith("ort")


def quantized_layers(graph: Graph) -> list[Node]:
    """The layers that read integers: whose weight is dequantized from a constant, though not when it is loaded."""
    return [node for _, node in graph.walk() if node.op in _LAYERS and len(node.inputs) > 1 and _is_stored(node)]


def _is_stored(node: Node) -> bool:
    found = _dequantized(node.inputs[1])
    return found is not None and isinstance(found.inputs[0], Parameter) and not found.attributes["at_load"]


def _dequantized(value: object) -> Node | None:
    producer = value.producer if isinstance(value, Value) else None
    if producer is not None and producer.op == "reshape":  # kernels whose blocks are of channels and places
        return _dequantized(producer.inputs[0])
    return producer if producer is not None and producer.op == "dequantize" else None
