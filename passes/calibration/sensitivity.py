"""How much the outputs of a graph move with each output of a layer: what an error of the layer weighs there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from regauge.ir.graph import Graph, Value
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.gradients import visit_gradients
from regauge.passes.calibration.layers import Layer, layer_of

_WIDE = 4096  # outputs
_SMALL = 1e-3  # share of the mean weight of an output


def layers_by_name(graph: Graph, names: Collection[str]) -> dict[str, Layer]:
    """The layers with weights of these names, in the order of the graph."""
    found = (layer_of(node, blocks=True) for node in graph.nodes)
    return {layer.weight.name: layer for layer in found if layer is not None and layer.weight.name in names}


def row_sensitivity(graph: Graph, names: Collection[str], batches: Sequence[Any], seed: int) -> dict[str, torch.Tensor]:
    """For each layer [outputs], the mean squared gradient over its rows, per example.

    With it a sum of squared errors over a layer's rows is, to first order, the squared change of the graph's outputs
    per example, so that layers can be compared (:mod:`regauge.passes.calibration.gradients`).
    """
    layers = layers_by_name(graph, names)
    by_output = {layer.node.output: name for name, layer in layers.items()}
    squares = {name: torch.zeros(layer.outputs, dtype=torch.float64) for name, layer in layers.items()}
    rows = dict.fromkeys(layers, 0)

    def visit(value: Value, _: torch.Tensor, gradient: torch.Tensor) -> None:
        name = by_output[value]
        own = layers[name].rows_of_output(gradient).double().square()
        squares[name] += own.sum(0)
        rows[name] += len(own)

    visit_gradients(graph, batches, list(by_output), visit, seed=seed)
    examples = max(1, sum(examples_in(batch) for batch in batches))
    return {name: total / max(1, rows[name]) / examples for name, total in squares.items()}


def output_metrics(graph: Graph, names: Collection[str], batches: Sequence[Any], seed: int) -> dict[str, torch.Tensor]:
    """For each layer [blocks, outputs, outputs], the mean over its rows of the gradient's outer product, per example.

    The form of a layer's error in it is, to first order and summed over rows, the squared change of the graph's outputs
    per example. Directions that hardly count are given a small weight; of very wide layers only the diagonal is held.
    Experts have one metric in common.
    """
    layers = layers_by_name(graph, names)
    by_output = {layer.node.output: name for name, layer in layers.items()}
    sums = dict[str, torch.Tensor]()
    rows = dict.fromkeys(layers, 0)

    def visit(value: Value, _: torch.Tensor, gradient: torch.Tensor) -> None:
        name = by_output[value]
        own = _rows(layers[name], gradient).double()
        found = own.mT @ own if layers[name].outputs <= _WIDE else own.square().sum(1)
        sums[name] = found if name not in sums else sums[name].add_(found)
        rows[name] += own.shape[1]

    visit_gradients(graph, batches, list(by_output), visit, seed=seed)
    examples = max(1, sum(examples_in(batch) for batch in batches))
    for name, total in sums.items():
        metric = total if total.dim() == 3 else total.diag_embed()
        metric = metric / max(1, rows[name]) / examples
        diagonal = metric.diagonal(dim1=1, dim2=2)
        diagonal.add_((diagonal.mean(1, keepdim=True) * _SMALL).clamp(min=1e-30))
        sums[name] = metric.expand(layers[name].blocks, -1, -1)
    return sums


def _rows(layer: Layer, gradient: torch.Tensor) -> torch.Tensor:
    """[blocks, rows, outputs]; of experts, which have few rows each, those of all of them as one block."""
    return gradient[None] if layer.node.op == "grouped_mm" else torch.stack(list(layer.blocks_of_output(gradient)))
