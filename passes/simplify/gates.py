"""Gates of image channels, spread to the whole image before they are multiplied, in ONNX files.

    Mul (x, Sigmoid (Conv (p)))     Mul (x, Resize (Sigmoid (Conv (p))))      x: n c h w     p: n k 1 1

Runtimes lay images out in blocks of channels between convolutions, and multiply them there where both have one shape:
a product that spreads its gate is taken out of that layout and back, which costs more than to spread the gate within
it. The same numbers to the last bit, and a node more for each gate.
"""

from __future__ import annotations

import torch

from regauge.ir.edit import Builder, set_input
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Graph, Node, Value
from regauge.passes.simplify.constants import is_part
from regauge.passes.simplify.limits import Limits, held_values, scopes
from regauge.passes.simplify.pooling import image_source

_BLOCK = 16  # channels that lie together where processors have the widest vectors
_SINCE = 11  # opset: Resize of older ones has other coordinates
_GATES = ("sigmoid", "hardsigmoid")


def spread_gates(graph: Graph, limits: Limits) -> int:
    """Spread gates of channels by a resize, in a graph that was loaded from ONNX; returns how many."""
    model = graph.metadata.get("onnx")
    if model is None or model.opset_imports.get("", 1) < _SINCE:
        return 0
    return sum(_spread_scope(owner, build) for owner, build in scopes(graph))


def _spread_scope(graph: Graph, build: Builder) -> int:
    held, count = held_values(graph), 0
    build.by = "gates"
    for node in list(graph.nodes):
        slot = None if node.op != "mul" or node.output in held else _gate_slot(node)
        if slot is not None:
            gate, image = node.inputs[slot], node.inputs[1 - slot]
            assert isinstance(gate, Value) and isinstance(image, Value)
            with build.at(node):
                build.origin = None  # it stands for no node of the file
                scale = tuple(float(size) for size in image.shape[2:])
                set_input(node, slot, build.interpolate(gate, scale=scale, mode="nearest"), graph)
            count += 1
    return count


def _gate_slot(node: Node) -> int | None:
    """Which operand of a product is a gate of the other one's channels, on the way from convolutions to one."""
    values = [operand for operand in node.inputs if isinstance(operand, Value)]
    if is_fixed(node) or is_part(node) or len(values) != 2 or node.output.dtype != torch.float32:
        return None
    if any(value.rank != 4 or value.dtype != torch.float32 for value in values):
        return None
    if not any(reader.op == "conv" for reader in node.output.consumers()):
        return None
    for slot, (gate, image) in enumerate((values, values[::-1])):
        if _is_gate(gate) and _is_wide(image) and image.shape[1] == gate.shape[1] and _is_blocked(image):
            return slot
    return None


def _is_gate(value: Value) -> bool:
    maker = value.producer
    if maker is None or maker.op not in _GATES or value.shape[2:] != (1, 1):
        return False
    source = maker.inputs[0]
    return isinstance(source, Value) and source.producer is not None and source.producer.op == "conv"


def _is_wide(value: Value) -> bool:
    """Whether an image has a block of channels and more than one pixel.

    All sizes have to be known, that of the batch too, or a runtime does not see that the two shapes are the same.
    """
    sizes = [size for size in value.shape if isinstance(size, int)]
    return len(sizes) == 4 and sizes[1] >= _BLOCK and sizes[2:] != [1, 1]


def _is_blocked(value: Value) -> bool:
    """Whether runtimes have blocks for what computes an image: groups of convolutions must be blocks, or channels."""
    maker = image_source(value)
    if maker is None or maker.op != "conv":
        return maker is not None
    groups, weight = maker.attributes["groups"], maker.inputs[1]
    assert isinstance(weight, Value)
    outputs, inputs = weight.shape[:2]
    if not isinstance(outputs, int) or not isinstance(inputs, int):
        return False
    return groups == 1 or inputs == 1 or (inputs % _BLOCK == 0 and outputs // groups % _BLOCK == 0)
