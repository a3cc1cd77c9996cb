"""Dims whose indices have copies, and pairs of indices as one: the two directions, on every parameter that has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch

from regauge.ir.dims.extents import Dim, Extent, Product, leaves, resolve
from regauge.ir.dims.kept import flat_indices, touches
from regauge.ir.dims.resize import taken
from regauge.ir.edit import record, set_weight
from regauge.ir.graph import Graph, Parameter
from regauge.ir.storage.weight_edits import computed_weight
from regauge.passes.growing.readers import Readers


def widened(
    graph: Graph,
    copies: Mapping[Dim, np.ndarray],
    shares: Mapping[Dim, np.ndarray],
    readers: Mapping[Dim, Readers],
    *,
    by: str,
) -> Graph:
    """A new graph in which index i of a Dim is a copy of what was ``copies[dim][i]``; the function stays the same.

    ``shares[dim][i]`` is the part that the copy counts where indices are added up; those of all copies of one index
    are 1 together.
    """
    result = taken(graph, copies)
    for parameter, axis in dict.fromkeys(side for own in readers.values() for side in own.sides):
        reading = {dim: shares[dim] for dim, own in readers.items() if (parameter, axis) in own.sides}
        factor = torch.from_numpy(_along(graph.axes.of[parameter][axis], reading, copies))
        shape = [-1 if at == axis else 1 for at in range(parameter.rank)]
        _multiply(result, result.parameters[parameter.name], factor.reshape(shape), by)
    _note(result, by, {dim: len(own) for dim, own in copies.items()})
    return result


def _multiply(graph: Graph, parameter: Parameter, factor: torch.Tensor, by: str) -> None:
    assert isinstance(parameter.dtype, torch.dtype)
    weight = computed_weight(
        lambda tensor: tensor * factor.to(tensor.device), [parameter], parameter.weight.shape, parameter.dtype
    )
    set_weight(graph, parameter, weight, by=by)


def _along(extent: Extent, shares: Mapping[Dim, np.ndarray], copies: Mapping[Dim, np.ndarray]) -> np.ndarray:
    """The shares along an axis as it is then, multiplied where it has several of the Dims."""
    found = resolve(extent)
    if isinstance(found, Dim):
        size = len(copies[found]) if found in copies else int(found.size)
        return shares[found] if found in shares else np.ones(size)
    if not isinstance(found, Product):
        return np.concatenate([_along(part, shares, copies) for part in found.segments])
    result = np.ones(1)
    for part in found.factors:
        result = np.multiply.outer(result, _along(part, shares, copies)).reshape(-1)
    return result


def halved(graph: Graph, pairs: Mapping[Dim, np.ndarray], readers: Mapping[Dim, Readers], *, by: str) -> Graph:
    """A new graph in which one index stands for each pair, [pairs, 2]: the mean of what writes it, the sum of what
    reads it. Of copies that :func:`widened` made this is what they were made of."""
    result = taken(graph, {dim: own[:, 0] for dim, own in pairs.items()})
    for parameter in graph.all_parameters():
        axes = graph.axes.of[parameter]
        if not any(touches(extent, pairs) for extent in axes) or not _has_numbers(parameter):
            continue
        own, before = result.parameters[parameter.name], graph.parameters[parameter.name]
        assert isinstance(own.dtype, torch.dtype)
        summed = {axis: {d for d in readers if (parameter, axis) in readers[d].sides} for axis in range(len(axes))}

        def change(
            tensor: torch.Tensor, axes: Sequence[Extent] = axes, summed: dict[int, set[Dim]] = summed
        ) -> torch.Tensor:
            for axis, extent in enumerate(axes):
                tensor = _joined(tensor, axis, extent, pairs, summed[axis])
            return tensor

        set_weight(result, own, computed_weight(change, [before], own.weight.shape, own.dtype), by=by)
    _note(result, by, {dim: len(own) for dim, own in pairs.items()})
    return result


def restored(
    original: Graph,
    small: Graph,
    pairs: Mapping[Dim, np.ndarray],
    readers: Mapping[Dim, Readers],
    share: float = 1.0,
    *,
    by: str,
    stands: Mapping[str, str] | None = None,
) -> Graph:
    """The original with the weights of a network that :func:`halved` made, both of a pair copies that count one half;
    below a ``share`` of 1 the rest of the weights is as it was. Those that the small network does not have are known
    there by the names that ``stands`` has for theirs."""
    stands = stands or {}
    result = original.copy()
    for before in original.all_parameters():
        if not _has_numbers(before):
            continue
        axes, mixes = original.axes.of[before], share < 1 and before.kind == "parameter"
        halves = [sum((before, axis) in own.sides for own in readers.values()) for axis in range(len(axes))]

        def change(
            new: torch.Tensor, old: torch.Tensor, axes: Sequence[Extent] = axes, halves: Sequence[int] = halves,
            mixes: bool = mixes,
        ) -> torch.Tensor:  # fmt: skip
            for axis, extent in enumerate(axes):
                if touches(extent, pairs):
                    new = new.index_select(axis, torch.from_numpy(_places(extent, pairs)).to(new.device))
            new = new / 2 ** sum(halves)
            return share * new + (1 - share) * old if mixes else new

        own = result.parameters[before.name]
        assert isinstance(own.dtype, torch.dtype)
        source = small.parameters[stands.get(before.name, before.name)]
        weight = computed_weight(change, [source, before], own.weight.shape, own.dtype)
        set_weight(result, own, weight, by=by)
    return result


def _places(extent: Extent, pairs: Mapping[Dim, np.ndarray]) -> np.ndarray:
    """For each position on an axis where what stands for it is on the axis of half the size."""
    found = resolve(extent)
    if isinstance(found, Dim):
        return np.argsort(pairs[found].reshape(-1)) // 2 if found in pairs else np.arange(int(found.size))
    halves = {dim: own[:, 0] for dim, own in pairs.items()}
    if isinstance(found, Product):
        place = np.zeros(1, dtype=np.int64)
        for part in found.factors:
            size = len(flat_indices(part, halves))
            place = np.add.outer(place * size, _places(part, pairs)).reshape(-1)
        return place
    sizes = [len(flat_indices(part, halves)) for part in found.segments]
    starts = np.cumsum([0, *sizes])
    return np.concatenate([_places(part, pairs) + at for part, at in zip(found.segments, starts, strict=False)])


def _joined(
    tensor: torch.Tensor, axis: int, extent: Extent, pairs: Mapping[Dim, np.ndarray], summed: set[Dim]
) -> torch.Tensor:
    """Pairs of entries along one axis as one."""
    own = [dim for dim in dict.fromkeys(leaves(extent)) if dim in pairs]
    if not own:
        return tensor
    parts = []
    for sides in product((0, 1), repeat=len(own)):
        kept = {dim: pairs[dim][:, side] for dim, side in zip(own, sides, strict=True)}
        parts.append(tensor.index_select(axis, torch.from_numpy(flat_indices(extent, kept)).to(tensor.device)))
    means = float(2 ** sum(dim not in summed for dim in own))
    return torch.stack(parts).sum(0) / means


def _has_numbers(parameter: Parameter) -> bool:
    return isinstance(parameter.dtype, torch.dtype) and parameter.dtype.is_floating_point


def _note(graph: Graph, by: str, sizes: Mapping[Dim, int]) -> None:
    for dim, size in sizes.items():
        record(graph, by, f"{dim.name}: {dim.size} -> {size}")
    graph.version += 1
