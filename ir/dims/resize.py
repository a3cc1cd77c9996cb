"""Removing indices from Dims, the one operation behind every kind of structured pruning; and reordering them.

before   w1: f32[64,3,3,3]  ->  relu  ->  w2: f32[10,64]      resize(graph, {dim 64: [0, 2, 5]})
after    w1: f32[3,3,3,3]   ->  relu  ->  w2: f32[10,3]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from regauge.ir.dims.extents import Concat, Dim, Product, format_extent, leaves, resolve
from regauge.ir.dims.groups import find_group
from regauge.ir.dims.kept import Keep, KeptWithin, after_another, in_turn, majors_in, size_after, touches, weight_kept
from regauge.ir.dims.majors import majors_of
from regauge.ir.edit import record
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph, Value
from regauge.ir.graph_copy import copy_graph

Selection: TypeAlias = Mapping[Dim, Iterable[Any]] | Mapping[str, Iterable[Any]] | Mapping[Dim | str, Iterable[Any]]


def resize(graph: Graph, keep: Selection | Keep, *, by: str = "resize") -> Graph:
    """A new graph in which each given Dim keeps only the given indices; the input graph is not changed.

    Every parameter is sliced by the positions its extents give, every size-valued attribute is derived anew. A Dim is
    given as an object (of ``graph.groups()`` or ``graph.dims(value)``) or by name. Where it lies within others
    everywhere (:func:`regauge.ir.dims.majors.majors_of`), as a head size lies within the heads, the indices may be
    other ones in each of these: an array [*sizes of the majors, count]. Raises GraphError for a pinned Dim (its reasons
    are in the message), an empty or out-of-range selection, and an array of another shape.
    """
    found = _checked(graph, keep)
    result = taken(graph, found)
    for dim in in_turn(found):
        sizes = (dim.name, int(dim.size), len(found[dim]))
        majors = tuple(major.name for major in majors_in(found, dim))
        what = f"{dim.name}: {dim.size} -> {len(found[dim])}"
        record(result, by, what, sizes, tuple(_array(found[dim]).reshape(-1).tolist()), majors)
    return result


def taken(graph: Graph, kept: Keep) -> Graph:
    """A copy in which each Dim has the given indices in the given order; nothing is checked."""
    analysis = graph.axes
    mapping: dict[Value, Value] = {}
    result = copy_graph(graph, mapping)
    for parameter in graph.all_parameters():
        axes = analysis.of[parameter]
        if any(touches(extent, kept) for extent in axes):
            mapping[parameter].weight = weight_kept(parameter.weight, axes, kept)  # type: ignore[attr-defined]
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


def kept_indices(original: Graph, cut_graph: Graph) -> dict[Dim, np.ndarray | KeptWithin]:
    """For each Dim that was cut on the way from one graph to another the indices that are left, as the first counts.

    Raises GraphError where the second graph was not made from the first.
    """
    start = len(original.history)
    if cut_graph.history[:start] != original.history:
        raise GraphError(
            f"graph {cut_graph.name!r} was not made from graph {original.name!r}: give the one it came from"
        )
    found: dict[Dim, np.ndarray | KeptWithin] = {}
    for edit in cut_graph.history[start:]:
        if edit.sizes is not None and edit.kept is not None:
            dim = find_group(original, edit.sizes[0]).dim
            majors = tuple(find_group(original, name).dim for name in edit.majors)
            found[dim] = after_another(found, dim, majors, np.asarray(edit.kept, dtype=np.int64))
    return found


def sizes_after(derived: Any, keep: Keep) -> Any:
    """The sizes of a (nested tuple or list of) extents after a cut; numbers stay as they are."""
    if isinstance(derived, Dim | Product | Concat):
        return size_after(derived, keep)
    if isinstance(derived, tuple | list):
        return tuple(sizes_after(part, keep) for part in derived)
    return derived


def _checked(graph: Graph, given: Selection | Keep) -> dict[Dim, np.ndarray | KeptWithin]:
    """The Dims that are meant and what they keep, sorted; within their majors where they are given more than a list."""
    dims = dims_meant(graph, given)
    found: dict[Dim, np.ndarray | KeptWithin] = {}
    for dim, (name, indices) in zip(dims, given.items(), strict=True):
        if not isinstance(indices, Iterable | KeptWithin):
            raise GraphError(f"{name} keeps indices, not a number of them: write range({indices}) for the first ones")
        array = _array(indices)
        found[dim] = np.unique(array) if array.ndim < 2 else _within_majors(graph, dim, np.sort(array, -1))
        _check(dim, _array(found[dim]))
    return found


def _array(given: Any) -> np.ndarray:
    if isinstance(given, KeptWithin):
        return given.indices
    return np.asarray(given if isinstance(given, np.ndarray) else list(given), dtype=np.int64)


def _within_majors(graph: Graph, dim: Dim, indices: np.ndarray) -> KeptWithin:
    majors = majors_of(graph, [dim])[dim]
    if not majors or indices.shape[:-1] != tuple(int(major.size) for major in majors):
        within = " and ".join(f"{major.name}, {major.size}" for major in majors) or "no other Dim: give one list"
        raise GraphError(f"{dim.name} is given indices of the shape {list(indices.shape)}, but it lies within {within}")
    return KeptWithin(majors, indices)


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
    repeated = indices.shape[-1] > 1 and bool((np.diff(indices) == 0).any())
    if not indices.size or indices.min() < 0 or indices.max() >= dim.size or repeated:
        raise GraphError(f"{dim.name} has the indices 0..{dim.size - 1}: keep at least one of them, and no other")
