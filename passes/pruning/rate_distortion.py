"""Measured losses: how much the outputs change when one Dim alone keeps so many indices, at a grid of counts.

For a Dim l and a share a that goes, d_l(a) is the squared distance of the outputs, per example, to those of the whole
graph, on data; the indices go in the order of their scores, and losses of different Dims are taken to add up (layer-
adaptive pruning by rate and distortion, Xu et al. 2023, section 3.1). Where layers are to be refitted behind the cut,
those that contract the Dim are, by least squares on the inputs that the whole graph gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.majors import majors_of
from regauge.ir.dims.resize import resize
from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph
from regauge.passes.allocation.choices import Choice
from regauge.passes.allocation.knapsack import Curve, options
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.layer_moments import visit_moments
from regauge.passes.calibration.layers import Layer, contracting, layer_of
from regauge.passes.calibration.moments import Moments, least_squares
from regauge.passes.calibration.probe import Probe
from regauge.passes.pruning.refit import RIDGE
from regauge.passes.pruning.selection import best

_GRID = 8  # counts per Dim at which the loss is measured, all indices included
_EXAMPLES = 256  # that the losses are measured on, about
_MEMORY = 1 << 30  # bytes of Gram matrices held at a time


def measured_curves(
    graph: Graph, choices: Sequence[Choice], scores: Mapping[Dim, np.ndarray], batches: Sequence[Any], *, refit: bool
) -> dict[Dim, Curve]:
    """The curve of each choice; the graph runs once for each Dim and count, and once per GiB of Gram matrices."""
    probe = Probe(graph, _first(batches))
    refittable = [layer for node in graph.nodes if refit and (layer := layer_of(node, turned=True))]
    readers = contracting(graph, [choice.dim for choice in choices], refittable)
    curves = {}
    for part in _parts(choices, readers):
        layers = dict.fromkeys(layer for choice in part for layer in readers[choice.dim])
        moments = dict(visit_moments(graph, layers, batches))
        for choice in part:
            counts = options(choice)[:-1]
            counts = np.unique(counts[np.linspace(0, len(counts) - 1, _GRID - 1).round().astype(int)])
            within = scores[choice.dim].ndim > 1
            mine = [_Reader.of(graph, choice.dim, within, layer, moments[layer]) for layer in readers[choice.dim]]
            losses = []
            for count in counts.tolist():
                kept = best(scores[choice.dim], count)
                small = resize(graph, {choice.dim: kept})
                for reader in mine:
                    reader.refit(small, int(choice.dim.size), kept)
                losses.append(probe.change(graph=small))
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


def _parts(choices: Sequence[Choice], readers: Mapping[Dim, Sequence[Layer]]) -> Iterator[list[Choice]]:
    """Choices whose layers' Gram matrices fit into memory together."""
    part, held = list[Choice](), 0
    for choice in choices:
        new = sum(8 * (layer.columns + 1) ** 2 for layer in readers[choice.dim])
        if part and held + new > _MEMORY:
            yield part
            part, held = [], 0
        part.append(choice)
        held += new
    yield part


@dataclass
class _Reader:
    """A layer that contracts a Dim, with what its refits to any number of indices have in common."""

    layer: Layer
    moments: Moments
    places: np.ndarray  # [indices, columns each]: the columns of each index
    whole: torch.Tensor  # [outputs, columns + 1]: its weight, and no bias
    cross: torch.Tensor  # [outputs, columns + 1]: Y'X, of the outputs without their bias

    @classmethod
    def of(cls, graph: Graph, dim: Dim, within: bool, layer: Layer, moments: Moments) -> _Reader:
        majors = majors_of(graph, [dim])[dim] if within else ()
        places = layer.columns_within(graph, (*majors, dim), 0) if majors else layer.columns_of(graph, dim)
        matrix = layer.matrix(layer.weight.tensor.detach()).double()
        whole = torch.cat([matrix, matrix.new_zeros(len(matrix), 1)], 1)
        return cls(layer, moments, places, whole, whole @ moments.gram)

    def refit(self, small: Graph, size: int, kept: np.ndarray) -> None:
        """Give the layer of the smaller graph the weight that comes nearest to its old outputs."""
        layer = self.layer
        same = (node for node in small.nodes if node.name == layer.node.name)
        twin = next(own for node in same if (own := layer_of(node, turned=True)))
        if twin.outputs != layer.outputs:  # the Dim is on both axes
            return
        goes = np.ones((*kept.shape[:-1], size), dtype=bool)
        np.put_along_axis(goes, kept, False, -1)
        left = np.ones(layer.columns + 1, dtype=bool)
        left[self.places[goes.reshape(-1)].reshape(-1)] = False
        columns = torch.from_numpy(np.flatnonzero(left))
        gram = self.moments.sums()[0][columns][:, columns]
        found = Moments.of(gram, self.cross[:, columns], self.moments.rows)
        free = layer.bias is not None or layer.norm is not None
        solved = least_squares(found, self.whole[:, columns], RIDGE, bias=free)
        set_weight(small, twin.weight, twin.stored(solved[:, :-1]), by="measured")
        shifted = twin.shifted(solved[:, -1])
        if shifted is not None:
            set_weight(small, *shifted, by="measured")
