"""Maps of low rank for keys and values, fitted on data layer by layer, and outputs refitted to make up for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph, Node
from regauge.passes.calibration.layer_errors import errors_of, set_matrices
from regauge.passes.calibration.layer_moments import moments_of
from regauge.passes.calibration.layers import Layer, matrices_of
from regauge.passes.calibration.side_by_side import SideBySide
from regauge.passes.decoding.latent_parts import Part
from regauge.passes.decoding.latent_turned import TurnedMoments, fit_seat

Factors = dict[Part, list[tuple[torch.Tensor, torch.Tensor]]]
"""Of each map of a part its factors: [channels of a head, rank] and [rank, inputs]; maps may differ in rank."""


def own_factors(changed: Graph, picked: Mapping[Part, tuple[int, ...]], *, by: str) -> Factors:
    """The factors of the weights as they are, in the metrics of what reads them; their products are written."""
    found: Factors = {}
    for part, ranks in picked.items():
        layer = part.heads.layer
        matrix = matrices_of(layer)[0].clone()
        maps = part.factored(matrix, None, None)
        found[part] = [one.of_rank(rank) for one, rank in zip(maps, ranks, strict=True)]
        _write(matrix, part, found[part])
        set_weight(changed, layer.weight, layer.stored(matrix), by=by)
    return found


def fitted_factors(
    original: Graph,
    changed: Graph,
    picked: Mapping[Part, tuple[int, ...]],
    batches: Sequence[Any],
    metrics: Mapping[str, torch.Tensor],
    turned: Mapping[Node, tuple[Part, TurnedMoments]],
    *,
    by: str,
) -> Factors:
    """The factors of the maps that give, from what the changed graph computes, most of what the original gives.

    ``picked`` has the ranks of each part of ``changed``, a copy of ``original``; products of factors are written into
    it, and weights of the layers that read attention are refitted. ``turned`` are the seats of keys that are projected
    behind their rotation, in both graphs.
    """
    found: Factors = {}
    projections = _by_node({part: part.heads.layer for part in picked if not part.turned})
    outputs = {part.site.output.layer.node: part.site.output.layer for part in picked if part.site.output is not None}
    run = SideBySide(original, changed, batches)
    for was, node in run.steps():
        if node in turned:
            part, moments = turned[node]
            found[part] = fit_seat(run, was, node, part, moments, picked[part], by=by)
        if node not in projections and node not in outputs:
            continue
        layer = outputs.get(node) or projections[node][0].heads.layer
        (error,) = errors_of(layer, moments_of(layer, run.inputs(layer), run.targets(layer, was)))
        matrix = (error.optimum if node in outputs else matrices_of(layer)[0]).clone()
        for part in projections.get(node, ()):
            maps = part.factored(error.optimum, error.hessian, metrics[layer.weight.name])
            found[part] = [one.of_rank(rank) for one, rank in zip(maps, picked[part], strict=True)]
            _write(matrix, part, found[part])
        set_matrices(changed, layer, matrix[None], [error], by=by)
    return found


def _by_node(layers: Mapping[Part, Layer]) -> dict[Any, list[Part]]:
    found: dict[Any, list[Part]] = {}
    for part, layer in layers.items():
        found.setdefault(layer.node, []).append(part)
    return found


def _write(matrix: torch.Tensor, part: Part, factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for rows, (up, down) in zip(part.maps, factors, strict=True):
        matrix[rows] = up @ down
