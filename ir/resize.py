"""Removing indices from Dims, the one operation behind every kind of structured pruning; and reordering them.

before   w1: f32[64,3,3,3]  ->  relu  ->  w2: f32[10,64]      resize(graph, {dim 64: [0, 2, 5]})
after    w1: f32[3,3,3,3]   ->  relu  ->  w2: f32[10,3]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from regauge.ir.edit import record
from regauge.ir.errors import GraphError
from regauge.ir.extents import (
    Concat,
    Dim,
    Extent,
    Keep,
    Product,
    flat_indices,
    format_extent,
    leaves,
    resolve,
    size_after,
    touches,
)
from regauge.ir.graph import Graph, Value
from regauge.ir.graph_copy import copy_graph
from regauge.ir.groups import find_group
from regauge.ir.weights import cut

Selection: TypeAlias = Mapping[Dim, Iterable[int]] | Mapping[str, Iterable[int]] | Mapping[Dim | str, Iterable[int]]


def resize(graph: Graph, keep: Selection, *, by: str = "resize") -> Graph:
    """A new graph in which each given Dim keeps only the given indices; the input graph is not changed.

    Every parameter is sliced by the positions its extents give, every size-valued attribute is derived anew. A Dim is
    given as an object (of ``graph.groups()`` or ``graph.dims(value)``) or by name. Raises GraphError for a pinned Dim
    (its reasons are in the message), an empty or out-of-range selection.
    """
    dims = dims_meant(graph, keep)
    kept = {found: _indices(dim, indices) for found, (dim, indices) in zip(dims, keep.items(), strict=True)}
    for dim, indices in kept.items():
        _check(dim, indices)
    result = taken(graph, kept)
    for dim, indices in kept.items():
        sizes = (dim.name, int(dim.size), len(indices))
        record(result, by, f"{dim.name}: {dim.size} -> {len(indices)}", sizes, tuple(indices.tolist()))
    return result


def taken(graph: Graph, kept: Mapping[Dim, np.ndarray]) -> Graph:
    """A copy in which each Dim has the given indices in the given order; nothing is checked."""
    analysis = graph.axes
    mapping: dict[Value, Value] = {}
    result = copy_graph(graph, mapping)
    for parameter in graph.all_parameters():
        axes = analysis.of[parameter]
        if any(touches(extent, kept) for extent in axes):
            selection = [flat_indices(extent, kept) if touches(extent, kept) else None for extent in axes]
            mapping[parameter].weight = cut(parameter.weight, selection)  # type: ignore[attr-defined]
    for value, axes in analysis.of.items():
        if value in mapping:
            mapping[value].shape = tuple(size_after(extent, kept) for extent in axes)
    for node, call in analysis.calls.items():
        if call.derived:
            copied = mapping[node.outputs[0]].producer
            assert copied is not None
            for attribute, extents in call.derived.items():
                copied.attributes[attribute] = sizes_after(extents, kept)
    return result


def part_kept(tensor: torch.Tensor, axes: Sequence[Extent], kept: Keep) -> torch.Tensor:
    """A tensor with these axes as it is when each Dim keeps the given indices."""
    for axis, extent in enumerate(axes):
        if touches(extent, kept):
            tensor = tensor.index_select(axis, torch.from_numpy(flat_indices(extent, kept)))
    return tensor


def kept_indices(original: Graph, cut_graph: Graph) -> dict[Dim, np.ndarray]:
    """For each Dim that was cut on the way from one graph to another the indices that are left, as the first counts.

    Raises GraphError where the second graph was not made from the first.
    """
    start = len(original.history)
    if cut_graph.history[:start] != original.history:
        raise GraphError(
            f"graph {cut_graph.name!r} was not made from graph {original.name!r}: give the one it came from"
        )
    found: dict[str, np.ndarray] = {}
    for edit in cut_graph.history[start:]:
        if edit.sizes is not None and edit.kept is not None:
            kept = np.asarray(edit.kept, dtype=np.int64)
            before = found.get(edit.sizes[0])
            found[edit.sizes[0]] = kept if before is None else before[kept]
    return {find_group(original, name).dim: kept for name, kept in found.items()}


def sizes_after(derived: Any, keep: Mapping[Dim, np.ndarray]) -> Any:
    """The sizes of a (nested tuple or list of) extents after a cut; numbers stay as they are."""
    if isinstance(derived, Dim | Product | Concat):
        return size_after(derived, keep)
    if isinstance(derived, tuple | list):
        return tuple(sizes_after(part, keep) for part in derived)
    return derived


def _indices(dim: Dim | str, given: Iterable[int]) -> np.ndarray:
    if not isinstance(given, Iterable):
        raise GraphError(f"{dim} keeps indices, not a number of them: write range({given}) for the first ones")
    return np.unique(np.asarray(list(given), dtype=np.int64))


def dims_meant(graph: Graph, given: Iterable[Dim | str]) -> list[Dim]:
    """The Dims of the graph as it is analysed now that are meant."""
    return [find_group(graph, dim).dim if isinstance(dim, str) else _resolved(graph, dim) for dim in given]


def _resolved(graph: Graph, dim: Dim) -> Dim:
    found = resolve(dim)
    if isinstance(found, Dim) and found in graph.axes.groups:
        return found
    graph.axes.name_values()
    if not isinstance(found, Dim):
        parts = " and ".join(part.name for part in leaves(found))
        raise GraphError(f"{dim.name or 'this Dim'} of size {dim.size} is {format_extent(found)} by now: cut {parts}")
    if not any(found in leaves(extent) for axes in graph.axes.of.values() for extent in axes):
        raise GraphError(
            f"{found} is no Dim of graph {graph.name!r}: copies have their own, take them from graph.dims()"
        )
    return found


def _check(dim: Dim, indices: np.ndarray) -> None:
    if dim.pins:
        raise GraphError(f"{dim.name} cannot be cut: {'; '.join(map(str, dim.pins))}")
    if not isinstance(dim.size, int):
        raise GraphError(f"{dim.name} has the dynamic size {dim.size}: it cannot be cut")
    if not len(indices) or indices[0] < 0 or indices[-1] >= dim.size:
        raise GraphError(f"{dim.name} has the indices 0..{dim.size - 1}: keep at least one of them, and no other")
