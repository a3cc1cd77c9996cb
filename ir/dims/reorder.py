"""Changing the order of the indices of Dims: the same function, since every parameter that has them follows.

before   w1: f32[4,3], w2: f32[10,4]          reorder(graph, {dim 4: [2, 0, 3, 1]})
after    w1[[2, 0, 3, 1]], w2[:, [2, 0, 3, 1]]
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.resize import Selection, dims_meant, taken
from regauge.ir.edit import record
from regauge.ir.errors import GraphError
from regauge.ir.gauge.classes import Gauge, gauges
from regauge.ir.graph import Graph


def may_be_reordered(graph: Graph, dims: Iterable[Dim]) -> list[Dim]:
    """Those Dims whose indices may be permuted: no operator tells them apart, no input or output has them."""
    found = gauges(graph)
    return [dim for dim in dims if not dim.pins and Gauge.PERMUTE in found.get(dim, Gauge.FIXED)]


def reorder(graph: Graph, orders: Selection, *, by: str = "reorder") -> Graph:
    """A new graph whose Dims have their indices in the given orders: index i is what was index ``order[i]``.

    It computes the same, up to rounding in sums. Dims are given as to :func:`regauge.ir.dims.resize.resize`. Raises
    GraphError for a Dim that must not be permuted, and for an order that does not name each index once.
    """
    dims = dims_meant(graph, orders)
    given = {dim: np.asarray(list(order), dtype=np.int64) for dim, order in zip(dims, orders.values(), strict=True)}
    allowed = set(may_be_reordered(graph, given))
    for dim, order in given.items():
        if dim not in allowed:
            raise GraphError(f"{dim.name} cannot be reordered: {'; '.join(map(str, dim.pins)) or 'its order is read'}")
        if not np.array_equal(np.sort(order), np.arange(int(dim.size))):
            raise GraphError(f"{dim.name} has the indices 0..{int(dim.size) - 1}: name each of them once")
    result = taken(graph, given)
    for dim, order in given.items():
        size = int(dim.size)
        record(result, by, f"{dim.name}: reordered", (dim.name, size, size), tuple(order.tolist()))
    result.version += 1
    return result
