"""Rotations that are computed in each run, where no weight can hold them: in front of layers, of queries and keys."""

from __future__ import annotations

import torch

from regauge.ir.edit import Builder, set_input, set_weight
from regauge.ir.gauge.classes import Gauge
from regauge.ir.gauge.frames import find_frames, frames_at
from regauge.ir.graph import Graph, Node, Value
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.quantization.hadamard import spread, two_factors

_SMALLEST = 16  # channels: with fewer there is nothing to spread an outlier over


def rotate_inputs(graph: Graph, generator: torch.Generator, *, by: str) -> int:
    """Rotate what layers read that lies in no rotated frame; the layers undo it. Returns of how many values."""
    frames = [frame for frame in find_frames(graph) if Gauge.ORTHOGONAL in frame.gauge]
    read: dict[Value, list[Layer]] = {}
    for node in graph.nodes:
        layer = layer_of(node) if node.op in ("linear", "matmul") else None
        x = node.inputs[0] if layer is not None else None
        if layer is not None and isinstance(x, Value) and x.producer is not None and not frames_at(frames, x, -1):
            read.setdefault(x, []).append(layer)
    wide = {x: layers for x, layers in read.items() if layers[0].columns >= _SMALLEST}
    for x, layers in wide.items():
        matrices = [spread(size, generator) for size in two_factors(layers[0].columns)]
        assert x.producer is not None
        turned = _turned(graph, x, matrices, x.producer, by)
        for layer in layers:
            weight = layer.matrix(layer.weight.tensor.detach()).double()
            set_weight(graph, layer.weight, layer.stored(weight @ torch.kron(*_contiguous(matrices)).T), by=by)
            set_input(layer.node, 0, turned, graph)
    return len(wide)


def rotate_queries(graph: Graph, generator: torch.Generator, *, by: str) -> int:
    """Rotate queries and keys of attention alike, where their weights cannot: their products stay."""
    frames = [frame for frame in find_frames(graph) if Gauge.ORTHOGONAL in frame.gauge]
    count = 0
    for node in [node for node in graph.nodes if node.op == "attention"]:
        operands = [value for value in node.inputs[:2] if isinstance(value, Value)]
        size = operands[0].shape[-1]
        if any(frames_at(frames, value, -1) for value in operands) or not isinstance(size, int):
            continue
        matrix = spread(size, generator)
        for slot, value in enumerate(operands):
            set_input(node, slot, _turned(graph, value, [matrix], node, by), graph)
        count += 1
    return count


def _turned(graph: Graph, x: Value, matrices: list[torch.Tensor], at: Node, by: str) -> Value:
    """The Kronecker product of one or two matrices times each vector on the last axis."""
    build = Builder(graph, by=by)
    assert isinstance(x.dtype, torch.dtype)
    tables = [
        build.parameter(build.unique(f"{x.name}_rotation"), matrix.to(x.dtype), "buffer")
        for matrix in matrices
        if len(matrix) > 1
    ]
    with build.at(at):
        if len(tables) == 1:
            found: Value = build.linear(x, tables[0])
            return found
        sizes = tuple(len(matrix) for matrix in matrices)
        parts = build.reshape(x, shape=(*x.shape[:-1], *sizes))
        parts = build.matmul(tables[0], build.linear(parts, tables[1]))
        joined: Value = build.reshape(parts, shape=x.shape)
        return joined


def _contiguous(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    return [matrix.contiguous() for matrix in matrices]
