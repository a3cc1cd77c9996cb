"""How far a graph is from another one, and from itself in few bits."""

from typing import Any

import torch

from regauge.ir.graph import Graph
from regauge.ir.storage.weights import dense
from regauge.passes.calibration.layers import layer_of
from regauge.passes.quantization.grid import Form, Grid


def relative(graph: Graph, other: Graph, inputs: Any) -> float:
    (a,), (b,) = graph.run(inputs), other.run(inputs)
    return float((a - b).abs().max() / a.abs().max())


def in_few_bits(graph: Graph, inputs: Any, bits: int) -> float:
    """The error in decibels with weights of so many bits for each row, and what layers read with 8 for all of it."""
    result, read, grid = graph.copy(), set(), Grid(8, symmetric=False)
    for node in result.nodes:
        layer = layer_of(node)
        if layer is not None:
            rows = layer.matrix(layer.weight.tensor.detach())
            layer.weight.weight = dense(layer.stored(Form(Grid(bits), rows.shape[1]).rounded(rows).values))
            read.add(node.inputs[0])

    def cut(node: Any, results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if node.outputs[0] not in read:
            return None
        scale, zero = grid.span(results[0].min(), results[0].max())
        return ((grid.codes(results[0], scale, zero) - zero) * scale,)

    (a,), (b,) = graph.run(inputs), result.run(inputs, hook=cut)
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))
