"""Which layer loses how much: the sum of what the layers' sparsity does to the outputs is made least.

For each layer the error after pruning and refitting is measured at some shares, weighed by how much the outputs move
with the layer's (:mod:`regauge.passes.calibration.sensitivity`). Errors of layers are taken to add up, as Xu et al.
2023 found them to (Efficient Joint Optimization of Layer-Adaptive Weight Pruning, section 3.2). With the lower convex
hull of each curve the least sum is reached by taking pieces in the order of their slopes, until enough is gone:
weights, or what they cost in a run (:mod:`regauge.passes.sparsity.run_costs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from regauge.ir.graph import Graph
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.layer_moments import visit_moments
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Moments
from regauge.passes.calibration.quadratic import change_of_output, refit
from regauge.passes.calibration.sensitivity import layers_by_name
from regauge.passes.sparsity.column_updates import prune_by_columns
from regauge.passes.sparsity.patterns import Pattern, grouped
from regauge.passes.sparsity.run_costs import RunCost, cost_per_weight

RIDGE = 1e-2  # share of the mean square of a column
_SHARES = (0.25, 0.5, 0.7, 0.85, 0.95)  # where errors are measured; a layer loses no more than the last


def adaptive_shares(
    graph: Graph,
    rows: Mapping[str, torch.Tensor],
    batches: Sequence[Any],
    pattern: Pattern,
    ratio: float,
    cost: RunCost = "weights",
) -> tuple[dict[str, float], dict[str, float]]:
    """The share of each layer's weights that goes, by name, and what the layers cost when all are kept.

    Together the shares are ``ratio`` of all costs.
    """
    curves, costs = {}, {}
    examples = max(1, sum(map(examples_in, batches)))
    for layer, moments in visit_moments(graph, layers_by_name(graph, rows).values(), batches):
        name = layer.weight.name
        if ratio < _SHARES[-1]:
            curves[name] = [0.0, *_errors(layer, moments, rows[name], pattern)]
        each = cost_per_weight(cost, layer, pattern, moments.rows / examples)
        costs[name] = layer.outputs * layer.columns * each
    shares = least_total(curves, costs, (0.0, *_SHARES), ratio) if curves else dict.fromkeys(rows, ratio)
    return shares, costs


def _errors(layer: Layer, moments: Moments, rows: torch.Tensor, pattern: Pattern) -> list[float]:
    columns = grouped(layer)
    weight = layer.matrix(layer.weight.tensor.detach()).double()
    bias = weight.new_zeros(len(weight))
    free = layer.bias is not None or layer.norm is not None
    problem = change_of_output(moments, weight, bias, RIDGE, free=free).ordered(columns)
    found = []
    for share in _SHARES:
        kept, updated = prune_by_columns(problem, pattern, share, rows)
        found.append(float((problem.losses(refit(problem, kept, updated)) * rows).sum()))
    return found


def least_total(
    curves: Mapping[str, Sequence[float]], costs: Mapping[str, float], shares: Sequence[float], ratio: float
) -> dict[str, float]:
    """The share of each layer, such that ``ratio`` of all costs goes and the sum of the curves is least.

    ``curves`` hold the error of each layer at the ``shares``, the first of which is 0.
    """
    pieces = []  # slope per cost, layer, share to which it leads
    for name, errors in curves.items():
        hull = _hull(shares, errors)
        for (left, low), (right, high) in zip(hull, hull[1:], strict=False):
            pieces.append(((high - low) / max((right - left) * costs[name], 1e-300), name, left, right))
    found = dict.fromkeys(curves, 0.0)
    left_over = ratio * sum(costs.values())
    for _, name, left, right in sorted(pieces, key=lambda piece: piece[0]):
        saved = min(left_over, (right - left) * costs[name])
        found[name] = left + (saved / costs[name] if costs[name] else right - left)
        left_over -= saved
        if left_over <= 0:
            break
    return found


def _hull(shares: Sequence[float], errors: Sequence[float]) -> list[tuple[float, float]]:
    """The lower convex hull of a curve, which is made rising first."""
    hull: list[tuple[float, float]] = []
    for point in zip(shares, np.maximum.accumulate(errors).tolist(), strict=True):
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _above(first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    (x0, y0), (x1, y1), (x2, y2) = first, middle, last
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)
