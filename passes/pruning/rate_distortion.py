"""Measured losses: how much the outputs change when one Dim alone keeps so many indices, at a grid of counts.

For a Dim l and a share a that goes, d_l(a) is the squared distance of the outputs, per example, to those of the whole
graph, on data; the indices go in the order of their scores, and losses of different Dims are taken to add up (layer-
adaptive pruning by rate and distortion, Xu et al. 2023, section 3.1). Where layers are to be refitted behind the cut,
those that contract the Dim are, by least squares on the inputs that the whole graph gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from regauge.ir.edit import set_weight
from regauge.ir.extents import Dim
from regauge.ir.graph import Graph
from regauge.ir.interpret import run
from regauge.ir.lockstep import Lockstep
from regauge.ir.resize import resize
from regauge.passes.allocation.choices import Choice
from regauge.passes.allocation.knapsack import Curve, options
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.calibration.moments import Moments, least_squares
from regauge.passes.pruning.refit import RIDGE
from regauge.passes.pruning.selection import best

_GRID = 8  # counts per Dim at which the loss is measured, all indices included
_EXAMPLES = 256  # that the losses are measured on, about
_MEMORY = 1 << 30  # bytes of Gram matrices held at a time


def measured_curves(
    graph: Graph, choices: Sequence[Choice], scores: Mapping[Dim, np.ndarray], batches: Sequence[Any], *, refit: bool
) -> dict[Dim, Curve]:
    """The curve of each choice; the graph runs once for each Dim and count, and once per GiB of Gram matrices."""
    probe = _Probe(graph, _first(batches))
    readers = _readers(graph, [choice.dim for choice in choices]) if refit else {}
    curves = {}
    for part in _parts(choices, readers):
        layers = {layer.node: layer for choice in part for layer in readers.get(choice.dim, ())}
        moments = _moments(graph, layers.values(), batches)
        for choice in part:
            counts = options(choice)[:-1]
            counts = np.unique(counts[np.linspace(0, len(counts) - 1, _GRID - 1).round().astype(int)])
            losses = []
            for count in counts.tolist():
                kept = best(scores[choice.dim], count)
                small = resize(graph, {choice.dim: kept})
                for layer in readers.get(choice.dim, ()):
                    _refit(graph, small, layer, moments[layer], choice.dim, kept)
                losses.append(probe.change(small))
            falling = np.maximum.accumulate([0.0, *losses[::-1]])[::-1]  # noise aside, more indices lose less
            curves[choice.dim] = Curve(np.array([*counts.tolist(), choice.size]), falling)
    return curves


def _first(batches: Sequence[Any]) -> list[Any]:
    """Batches from the front, until they hold enough examples."""
    found: list[Any] = []
    for batch in batches:
        if sum(map(examples_in, found)) >= _EXAMPLES:
            break
        found.append(batch)
    return found


def _readers(graph: Graph, dims: Sequence[Dim]) -> dict[Dim, list[Layer]]:
    """The layers that contract each Dim and can be refitted."""
    layers = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
    return {dim: [layer for layer in layers if layer.columns_of(graph, dim).size] for dim in dims}


def _parts(choices: Sequence[Choice], readers: Mapping[Dim, Sequence[Layer]]) -> Iterator[list[Choice]]:
    """Choices whose layers' Gram matrices fit into memory together."""
    part, held = list[Choice](), 0
    for choice in choices:
        new = sum(8 * (layer.columns + 1) ** 2 for layer in readers.get(choice.dim, ()))
        if part and held + new > _MEMORY:
            yield part
            part, held = [], 0
        part.append(choice)
        held += new
    yield part


def _moments(graph: Graph, layers: Any, batches: Sequence[Any]) -> dict[Layer, Moments]:
    by_node = {layer.node: layer for layer in layers}
    found = {layer: Moments(layer.columns) for layer in by_node.values()}
    lockstep = Lockstep(graph, batches if by_node else [])
    for node in lockstep.steps() if by_node else ():
        layer = by_node.get(node)
        for x in lockstep.values(node.inputs[0]) if layer is not None else ():
            found[by_node[node]].add(by_node[node].rows_of_input(x))
    for layer, moments in found.items():
        moments.check(layer.node.label)
    return found


def _refit(graph: Graph, small: Graph, layer: Layer, moments: Moments, dim: Dim, kept: np.ndarray) -> None:
    """Give the layer of the smaller graph the weight that comes nearest to its old outputs."""
    twin = next(own for node in small.nodes if node.name == layer.node.name and (own := layer_of(node)) is not None)
    columns = layer.columns_of(graph, dim)
    left = np.ones(layer.columns + 1, dtype=bool)
    left[np.delete(columns, kept, axis=0).reshape(-1)] = False
    left_columns = torch.from_numpy(np.flatnonzero(left))
    matrix = layer.matrix(layer.weight.tensor.detach()).double()
    whole = torch.cat([matrix, matrix.new_zeros(len(matrix), 1)], 1)  # the outputs without their bias
    gram = moments.gram
    cross = whole.to(gram.dtype) @ gram[:, left_columns]
    found = Moments.of(gram[left_columns][:, left_columns], cross, moments.rows)
    free = layer.bias is not None or layer.norm is not None
    solved = least_squares(found, whole[:, left_columns], RIDGE, bias=free)
    if twin.outputs != layer.outputs:  # the Dim is on both axes
        return
    set_weight(small, twin.weight, twin.stored(solved[:, :-1]), by="measured")
    shifted = twin.shifted(solved[:, -1])
    if shifted is not None:
        set_weight(small, *shifted, by="measured")


class _Probe:
    """The outputs of a graph on a few examples, to compare smaller graphs with."""

    def __init__(self, graph: Graph, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.expected = [_outputs(graph, batch) for batch in batches]
        self.examples = max(1, sum(map(examples_in, batches)))

    def change(self, graph: Graph) -> float:
        """The squared change of the outputs per example."""
        total = 0.0
        for batch, expected in zip(self.batches, self.expected, strict=True):
            for y, before in zip(_outputs(graph, batch), expected, strict=True):
                total += float((y - before).square().sum())
        return total / self.examples


def _outputs(graph: Graph, batch: Any) -> list[torch.Tensor]:
    return [y.double() for y in run(graph, batch) if isinstance(y, torch.Tensor) and y.is_floating_point()]
