"""Reordering the inputs of layers so that N:M masks lose less; what the graph computes stays the same.

Which inputs share a group of M is decided anew by exchanging inputs between groups while the cost of what is kept
rises (Pool and Yu 2021, Channel Permutations for N:M Sparsity, section 4.1). An order of a Dim is an order of the
inputs of every layer that contracts it, and of whatever else has it, so residual streams, heads and concatenations
need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.reorder import may_be_reordered, reorder
from regauge.ir.graph import Graph
from regauge.passes.base import Context
from regauge.passes.calibration.layer_moments import visit_moments
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import factor_of, ridge_of
from regauge.passes.calibration.sensitivity import layers_by_name, row_sensitivity
from regauge.passes.sparsity.patterns import NofM, Pattern, TransposableNofM

RIDGE = 1e-2  # share of the mean square of a column
_ROUNDS = 100
_WORK = 1 << 31  # comparisons in a round
_LEAST_ROWS = 64
_NUMBERS = 1 << 24  # that are held at a time
_LEAST_GAIN = 1e-6  # share of what a group keeps that an exchange has to add


def permuted(
    graph: Graph, names: Sequence[str], pattern: Pattern, batches: Sequence[Any] | None, seed: int, context: Context,
    *, by: str,
) -> Graph:  # fmt: skip
    """The graph with its free Dims in the order that lets a mask N:M keep most, in the layers of these names."""
    assert isinstance(pattern, NofM | TransposableNofM)
    costs = _costs(graph, names, batches, seed)
    layers = layers_by_name(graph, names)
    orders: dict[Dim, np.ndarray] = {}
    before = after = 0.0
    groups = [group for group in graph.groups() if group.free and int(group.size) % pattern.of == 0]
    for dim in may_be_reordered(graph, [group.dim for group in groups]):
        rows = [
            table for name in layers if (table := _rows(graph, layers[name], costs[name], dim, pattern.of)) is not None
        ]
        if not rows:
            continue
        order, kept, better = best_order(torch.cat(rows), pattern.keep, pattern.of)
        before, after = before + kept, after + better
        if better > kept:
            orders[dim] = order
    if not orders:
        return graph
    context.note(f"{len(orders)} Dims reordered: what is kept weighs {after / before - 1:+.1%}")
    return reorder(graph, orders, by=by)


def _costs(graph: Graph, names: Sequence[str], batches: Sequence[Any] | None, seed: int) -> Mapping[str, torch.Tensor]:
    """What each entry [outputs, columns] weighs: |w|, with data what removing it costs the outputs of the graph."""
    if batches is None:
        layers = layers_by_name(graph, names)
        return {name: layer.matrix(layer.weight.tensor.detach()).double().abs() for name, layer in layers.items()}
    rows = row_sensitivity(graph, names, batches, seed)
    found = {}
    for layer, moments in visit_moments(graph, layers_by_name(graph, names).values(), batches):
        gram = moments.gram[:-1, :-1]
        amount = ridge_of(float(gram.diag().sum()), len(gram), RIDGE)
        inverse = torch.cholesky_inverse(factor_of(gram, amount)).diag()
        weight = layer.matrix(layer.weight.tensor.detach()).double()
        found[layer.weight.name] = weight.square() / inverse * rows[layer.weight.name][:, None]
    return found


def _rows(graph: Graph, layer: Layer, costs: torch.Tensor, dim: Dim, of: int) -> torch.Tensor | None:
    """The costs of a layer as rows over the indices of a Dim; None where its groups are not groups of the pattern."""
    columns = layer.columns_of(graph, dim)
    if not columns.shape[1]:
        return None
    channels = columns // layer.taps
    aligned = (channels[::of] % of == 0).all()
    if not aligned or any((channels[step::of] - channels[::of] != step).any() for step in range(1, of)):
        return None
    return costs[:, torch.from_numpy(columns)].permute(0, 2, 1).reshape(-1, len(columns))


def best_order(costs: torch.Tensor, keep: int, of: int) -> tuple[np.ndarray, float, float]:
    """An order of the columns of ``costs`` [rows, columns], and what N:M keeps before and after it.

    In each round all exchanges of two columns are looked at, and the best are made that do not touch the same group,
    until none adds anything. Bounded: so many rounds, and of many rows those that cost most.
    """
    columns = costs.shape[1]
    most = max(_LEAST_ROWS, _WORK // columns**2)
    whole = costs
    costs = costs if len(costs) <= most else costs[costs.sum(1).topk(most).indices]
    order = torch.arange(columns)
    for _ in range(_ROUNDS):
        exchanges = _best_exchanges(costs[:, order], keep, of)
        if not exchanges:
            break
        for one, other in exchanges:
            order[[one, other]] = order[[other, one]]
    kept = [float(NofM(keep, of).kept(table).sum()) for table in (whole, whole[:, order])]
    return order.numpy(), kept[0], kept[1]


def _best_exchanges(costs: torch.Tensor, keep: int, of: int) -> list[tuple[int, int]]:
    """Pairs of places [columns] whose exchange adds to what is kept, the best first, no two in the same group.

    A group that gets x in place of one of its entries keeps the sum of the keep - 1 greatest others, and the greater of
    x and the next one.
    """
    rows, columns = costs.shape
    groups = costs.reshape(rows, -1, of)
    others = torch.stack([groups[:, :, [i for i in range(of) if i != place]] for place in range(of)], 2)
    best = others.topk(keep, 3).values.reshape(rows, columns, keep)
    least = best[:, :, -1]
    fixed = best[:, :, :-1].sum((0, 2))
    chunk = max(1, _NUMBERS // (rows * columns))
    places = torch.split(torch.arange(columns), chunk)
    with_other = torch.cat([torch.maximum(least[:, p, None], costs[:, None, :]).sum(0) for p in places])
    now = NofM(keep, of).kept(costs).sum(0).repeat_interleave(of)  # what the group of each place keeps
    gain = with_other + fixed[:, None] - now[:, None]
    gain = gain + gain.t()
    group = torch.arange(columns) // of
    gain[group[:, None] == group[None, :]] = 0
    value, partner = gain.max(1)
    found: list[tuple[int, int]] = []
    touched: set[int] = set()
    for place in value.argsort(descending=True).tolist():
        if float(value[place]) <= _LEAST_GAIN * float(now[place]):
            break
        pair = (place, int(partner[place]))
        if not touched.intersection(p // of for p in pair):
            touched.update(p // of for p in pair)
            found.append(pair)
    return found
