"""Cuts axes and tensors to the indices that Dims keep: the same everywhere, or different ones within other Dims.

A Dim whose kept indices differ from index to index of other Dims, its *majors*, is reordered in each index of these, so
that the kept ones come first, and then cut as any other: the first so many stay.

    axis (h=2 d=4), d keeps [0, 2] in the first h and [1, 3] in the second:    positions 0 2 | 5 7
    weight [g, i],  i keeps these in the two g:                                [[w00, w02], [w11, w13]]

Which Dims may be majors of which: :mod:`regauge.ir.dims.majors`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from regauge.ir.dims.extents import Dim, Extent, Product, coordinates, leaves, resolve, size_of
from regauge.ir.errors import AxisError
from regauge.ir.sizes.expressions import Size, product, total
from regauge.ir.storage.weights import Weight, cut, reordered, taken_along


@dataclass(frozen=True, eq=False)
class KeptWithin:
    """The indices that a Dim keeps in each index of its majors, [*sizes of the majors, count]."""

    majors: tuple[Dim, ...]
    indices: np.ndarray

    def __len__(self) -> int:
        return int(self.indices.shape[-1])

    def order(self, size: int) -> np.ndarray:
        """All indices of the Dim in each index of its majors, [*sizes of the majors, size]: those that stay first."""
        goes = np.ones((*self.indices.shape[:-1], size), dtype=bool)
        np.put_along_axis(goes, self.indices, False, -1)
        places = np.argsort(goes, axis=-1, kind="stable")
        places[..., : len(self)] = self.indices
        return places


Keep: TypeAlias = Mapping[Dim, np.ndarray | KeptWithin]


def shared(keep: Keep) -> dict[Dim, np.ndarray]:
    """What is cut once Dims are reordered within their majors: the same indices everywhere."""
    return {dim: np.arange(len(kept)) if isinstance(kept, KeptWithin) else kept for dim, kept in keep.items()}


def orders(axes: Sequence[Extent], keep: Keep, rows: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """How a tensor with these axes is reordered before it is cut: axes, and positions to take along them, in turn.

    The positions broadcast along the other axes, as those of ``torch.take_along_dim`` do. ``rows`` are indices of a
    major along the first axis of a tensor that has it on none.
    """
    within = {dim: kept for dim, kept in keep.items() if isinstance(kept, KeptWithin)}
    for dim in in_turn(within):
        for axis, extent in enumerate(axes):
            if dim in leaves(extent):
                yield axis, _positions(axes, axis, dim, within[dim], rows)


def in_turn(keep: Keep) -> list[Dim]:
    """Dims before their majors: what a Dim keeps is said by indices of its majors before these are cut."""
    found: dict[Dim, None] = {}

    def enter(dim: Dim) -> None:
        if dim not in found:
            for other in keep:
                if dim in majors_in(keep, other):
                    enter(other)
            found[dim] = None

    for dim in keep:
        enter(dim)
    return list(found)


def majors_in(keep: Keep, dim: Dim) -> tuple[Dim, ...]:
    """The majors within which a Dim is cut."""
    kept = keep.get(dim)
    return kept.majors if isinstance(kept, KeptWithin) else ()


def after_another(before: Keep, dim: Dim, majors: tuple[Dim, ...], indices: np.ndarray) -> np.ndarray | KeptWithin:
    """What a Dim keeps when it is cut once more, counted as before the first cut, which left ``before``.

    ``indices`` are [*sizes of the majors, count], in any shape, and count as after the first cut. Raises AxisError
    where a major was itself cut within another Dim.
    """
    first, earlier = before.get(dim), majors_in(before, dim)
    every = majors or earlier
    if (earlier and earlier != every) or any(majors_in(before, major) for major in every):
        raise AxisError(f"{dim.name} was cut within several Dims, one after the other: that cannot be followed")
    if not every:
        left: np.ndarray = indices if first is None else np.asarray(first)[indices]
        return left
    sizes = [int(major.size) for major in every]
    known = [np.asarray(before.get(major, np.arange(size))) for major, size in zip(every, sizes, strict=True)]
    held = first.indices if isinstance(first, KeptWithin) else np.arange(int(dim.size)) if first is None else first
    held = np.broadcast_to(held, (*sizes, np.shape(held)[-1]))
    sizes_left = [len(part) for part in known]
    second = indices.reshape(*sizes_left, -1) if majors else np.broadcast_to(indices, (*sizes_left, len(indices)))
    found = np.broadcast_to(held[..., : second.shape[-1]], (*sizes, second.shape[-1])).copy()
    found[np.ix_(*known)] = np.take_along_axis(held[np.ix_(*known)], second, -1)
    return KeptWithin(every, found)


def _positions(axes: Sequence[Extent], axis: int, dim: Dim, kept: KeptWithin, rows: np.ndarray | None) -> np.ndarray:
    index, step = (
        part.reshape([-1 if at == axis else 1 for at in range(len(axes))]) for part in coordinates(axes[axis], dim)
    )
    has = index >= 0
    majors = [_along(axes, axis, major, has, rows) for major in kept.majors]
    index = index.clip(min=0)
    new = kept.order(int(dim.size))[(*majors, index)]
    found: np.ndarray = np.arange(index.size).reshape(index.shape) + np.where(has, (new - index) * step, 0)
    return found


def _along(
    axes: Sequence[Extent], axis: int, major: Dim, has: np.ndarray, rows: np.ndarray | None = None
) -> np.ndarray:
    """The index of a major wherever an axis has the minor: from that axis itself, or from another one."""
    for place in (axis, *(other for other in range(len(axes)) if other != axis)):
        if major in leaves(axes[place]):
            index = coordinates(axes[place], major)[0].reshape([-1 if at == place else 1 for at in range(len(axes))])
            if place != axis or bool((index[has] >= 0).all()):
                return index.clip(min=0)
    if rows is not None:
        return rows.reshape([-1] + [1] * (len(axes) - 1))
    raise AxisError(f"no axis has {major.name}, within which another Dim is cut")


def numbered(axes: Sequence[Extent], axis: int, dims: Sequence[Dim]) -> np.ndarray:
    """Which combination of indices of Dims is where in a tensor with these axes: its number, or -1 for none.

    The last Dim, which counts fastest, is on the given axis. The numbers broadcast along axes that have none of them.
    """
    last = coordinates(axes[axis], dims[-1])[0].reshape([-1 if at == axis else 1 for at in range(len(axes))])
    number = np.zeros_like(last)
    for major in dims[:-1]:
        number = number * int(major.size) + _along(axes, axis, major, last >= 0)
    found: np.ndarray = np.where(last >= 0, number * int(dims[-1].size) + last, -1)
    return found


def flat_indices(extent: Extent, keep: Keep) -> np.ndarray:
    """The positions on the axis that remain when each Dim of ``keep`` keeps the given (sorted) indices.

    Raises AxisError where the axis has a Dim that is cut within one of another axis: see :func:`part_kept`.
    """
    if not any(isinstance(keep.get(dim), KeptWithin) for dim in leaves(extent)):
        return _flat(extent, keep)
    found = np.arange(_static(extent))
    for _, positions in orders([extent], keep):
        found = found[positions]
    rest: np.ndarray = found[_flat(extent, shared(keep))]
    return rest


def _flat(extent: Extent, keep: Keep) -> np.ndarray:
    found = resolve(extent)
    if isinstance(found, Dim):
        kept = keep.get(found)
        return np.arange(_static(found)) if kept is None else np.asarray(kept)
    if isinstance(found, Product):
        result = np.zeros(1, dtype=np.int64)
        for factor in found.factors:
            result = (result[:, None] * _static(factor) + _flat(factor, keep)[None, :]).reshape(-1)
        return result
    parts, offset = [np.zeros(0, dtype=np.int64)], 0
    for segment in found.segments:
        parts.append(_flat(segment, keep) + offset)
        offset += _static(segment)
    return np.concatenate(parts)


def part_kept(tensor: torch.Tensor, axes: Sequence[Extent], keep: Keep, rows: np.ndarray | None = None) -> torch.Tensor:
    """A tensor with these axes as it is when each Dim keeps the given indices; ``rows`` as in :func:`orders`."""
    for axis, positions in orders(axes, keep, rows):
        tensor = taken_along(tensor, positions, axis)
    same = shared(keep)
    for axis, extent in enumerate(axes):
        if touches(extent, same):
            tensor = tensor.index_select(axis, torch.from_numpy(_flat(extent, same)).to(tensor.device))
    return tensor


def weight_kept(weight: Weight, axes: Sequence[Extent], keep: Keep) -> Weight:
    """A weight with these axes of which each Dim keeps the given indices."""
    for axis, positions in orders(axes, keep):
        weight = reordered(weight, axis, positions)
    same = shared(keep)
    return cut(weight, [_flat(extent, same) if touches(extent, same) else None for extent in axes])


def size_after(extent: Extent, keep: Keep) -> Size:
    """The size of the axis when each Dim of ``keep`` keeps the given indices; works for symbolic sizes too."""
    found = resolve(extent)
    if isinstance(found, Dim):
        kept = keep.get(found)
        return found.size if kept is None else len(kept)
    if isinstance(found, Product):
        return product(size_after(f, keep) for f in found.factors)
    return total(size_after(s, keep) for s in found.segments)


def touches(extent: Extent, keep: Container[Dim]) -> bool:
    return any(dim in keep for dim in leaves(extent))


def _static(extent: Extent) -> int:
    size = size_of(extent)
    if not isinstance(size, int):
        raise AxisError(f"axis {extent} has the dynamic size {size}: its indices cannot be listed")
    return size
