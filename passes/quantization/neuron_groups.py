"""Bringing outputs of layers whose weights are alike next to one another, so that neighbours may share a codebook.

    w1: rows of size 1, 9, 1, 8      w1[[0, 2, 1, 3]], and whoever reads the outputs w2[:, [0, 2, 1, 3]]

The function stays the same: the order of a Dim is changed in every weight that has it (:mod:`regauge.ir.dims.reorder`),
and no index is stored (JLCM, whose groups are those of k-means on statistics of rows; here of equal sizes).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from regauge.ir.dims.extents import Dim, resolve
from regauge.ir.dims.reorder import may_be_reordered, reorder
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer

_ROUNDS = 20  # of k-means
_SHARES = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99], dtype=torch.float64)  # quantiles that describe a row


def with_like_rows_together(graph: Graph, layers: Sequence[Layer], size: int, *, by: str) -> tuple[Graph, int]:
    """The graph with outputs of layers in groups of ``size`` alike ones, and how many Dims have another order now.

    Dims are those that alone are the outputs of a layer, and that nothing tells the indices of apart.
    """
    rows: dict[Dim, list[torch.Tensor]] = {}
    for layer in layers:
        made = resolve(graph.axes.of[layer.weight][layer.made]) if layer.blocks == 1 else None
        if isinstance(made, Dim) and isinstance(made.size, int) and made.size % size == 0 and made.size > size:
            rows.setdefault(made, []).append(layer.matrix(layer.weight.tensor.detach()).double())
    orders = {dim: alike(_described(rows[dim]), size) for dim in may_be_reordered(graph, rows)}
    return (reorder(graph, orders, by=by) if orders else graph), len(orders)


def _described(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Quantiles [rows, numbers] of the entries of each row, each layer's in units of its own entries."""
    return torch.cat([part.quantile(_SHARES, 1).t() / part.std().clamp(min=1e-300) for part in parts], 1)


def alike(rows: torch.Tensor, size: int) -> np.ndarray:
    """An order of ``rows`` [rows, numbers] in which each ``size`` neighbours are alike: k-means with equal groups.

    From rows along their first principal component on; of all pairs of row and group the nearest are made first.
    """
    centred = rows - rows.mean(0)
    axis = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    order = (centred @ axis).argsort()
    best, least = order, _spread(rows[order], size)
    for _ in range(_ROUNDS):
        centres = rows[order].reshape(-1, size, rows.shape[1]).mean(1)
        order = _assigned(torch.cdist(rows, centres), size)
        spread = _spread(rows[order], size)
        if spread >= least:
            break
        best, least = order, spread
    found: np.ndarray = best.numpy()
    return found


def _spread(ordered: torch.Tensor, size: int) -> float:
    parts = ordered.reshape(-1, size, ordered.shape[1])
    return float((parts - parts.mean(1, keepdim=True)).square().sum())


def _assigned(distances: torch.Tensor, size: int) -> torch.Tensor:
    """Rows in groups of one size, by distances [rows, groups]."""
    groups: list[list[int]] = [[] for _ in range(distances.shape[1])]
    placed: set[int] = set()
    for pair in distances.reshape(-1).argsort().tolist():
        row, group = divmod(pair, distances.shape[1])
        if row not in placed and len(groups[group]) < size:
            groups[group].append(row)
            placed.add(row)
    return torch.tensor([row for group in groups for row in group])
