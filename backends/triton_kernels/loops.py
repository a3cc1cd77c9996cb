"""The loops of a kernel: neighbours that every tensor has, or lacks, one behind the other are one loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from regauge.ir.affine import Affine
from regauge.ir.dims.extents import Dim
from regauge.ir.errors import FusionError
from regauge.ir.fusion.region import Layout, Region
from regauge.ir.fusion.terms import PLACES
from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import evaluate, is_static, solve_bindings


@dataclass(frozen=True)
class Loop:
    """Dims that a kernel goes through with one index, the slowest first."""

    name: str
    dims: tuple[Dim, ...]

    def size(self, sizes: Mapping[Dim, int]) -> int:
        return math.prod(sizes[dim] for dim in self.dims)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor that a kernel reads or writes, under a name of its own; ``places`` are the indices of its own loops, and
    ``picked`` are loops whose index is read."""

    name: str
    value: Value
    layout: Layout
    places: Mapping[Dim, Affine]
    picked: tuple[Dim, ...] = ()

    @cached_property
    def axes(self) -> frozenset[Dim]:
        """The loops that it is read or written along."""
        return frozenset(dim for place in self.places.values() for dim in place.dims)

    @property
    def shifts(self) -> bool:
        """Whether its first entry is read elsewhere than at the first index of all loops."""
        return any(place.shifts for place in self.places.values())

    def loops(self, loops: Iterable[Loop]) -> list[Loop]:
        """Those of the loops that the tensor has."""
        return [loop for loop in loops if loop.dims[0] in self.axes]


MOST_INDICES = 2**31 - 1
"""Indices that several loops of one side of a tile have together: the joint one is taken apart in 32 bits."""


@dataclass(frozen=True, eq=False)
class Loops:
    """The loops of a kernel: ``rows``, and ``columns``, which are reduced where anything is.

    Of a contraction rows are those of its left factor and columns those of its right one; both factors have ``batch``
    and what is ``contracted``. Of attention these are queries, columns of values, heads, and what scores are summed
    over; keys and values have ``source``, and may be made of what has a ``rank`` and a ``value_rank``. Of ``measured``
    axes, which are no loops, only the sizes are asked for. ``parts`` are the columns of products that lie beside one
    another: one after the other, each in tiles of its own.
    """

    rows: tuple[Loop, ...]
    columns: tuple[Loop, ...]
    batch: tuple[Loop, ...] = ()
    contracted: tuple[Loop, ...] = ()
    source: tuple[Loop, ...] = ()
    measured: tuple[Loop, ...] = ()
    rank: tuple[Loop, ...] = ()
    parts: tuple[tuple[Loop, ...], ...] = ()
    value_rank: tuple[Loop, ...] = ()

    @cached_property
    def all(self) -> tuple[Loop, ...]:
        inner = (*self.contracted, *self.source, *self.rank, *self.value_rank)
        return (*self.batch, *self.rows, *self.columns, *inner)

    @property
    def sized(self) -> tuple[Loop, ...]:
        """What the kernel is told the sizes of."""
        return (*self.all, *self.measured)


def count(loops: Iterable[Loop], sizes: Mapping[Dim, int]) -> int:
    """How many indices loops have together."""
    return math.prod(loop.size(sizes) for loop in loops)


def check_counted(name: str, loops: Loops, sizes: Mapping[Dim, int]) -> None:
    """Raise FusionError where several loops have more indices together than kernels of tiles count."""
    sides = (
        loops.rows,
        *(loops.parts or (loops.columns,)),
        loops.batch,
        loops.contracted,
        loops.source,
        loops.rank,
        loops.value_rank,
    )
    for side in sides:
        if len(side) > 1 and count(side, sizes) > MOST_INDICES:
            shape = " x ".join(str(loop.size(sizes)) for loop in side)
            raise FusionError(f"{name}: {shape} indices along one side of its tiles, {MOST_INDICES} at most")


def widths(loops: Loops, sizes: Mapping[Dim, int]) -> list[int]:
    """How many columns each part has."""
    return [count(part, sizes) for part in loops.parts or (loops.columns,)]


def loops_of(region: Region, tensors: Sequence[Tensor], *, contiguous: bool, sweep: bool = False) -> Loops:
    """The loops of a region.

    With ``contiguous`` neighbouring axes of a tensor are taken for one, which its strides have to allow
    (:func:`fits`); else only parts of one axis are. A pointwise region has the last of its loops as columns, and so has
    one whose reductions ``sweep`` over what is then contracted.
    """

    layouts = [*(tensor.layout for tensor in tensors), *((t.value,) for t in region.terms if t.op in PLACES)]

    def merged(letter: str) -> tuple[Loop, ...]:
        groups: list[tuple[Dim, ...]] = []
        for dim in region.loops:
            if region.names[dim][0] != letter:
                continue
            apart = dim in region.shifted or groups and groups[-1][-1] in region.shifted
            if groups and not apart and all(_follow(layout, groups[-1][-1], dim, contiguous) for layout in layouts):
                groups[-1] = (*groups[-1], dim)
            else:
                groups.append((dim,))
        return tuple(Loop(region.names[dims[0]], dims) for dims in groups)

    measured = tuple(Loop(region.names[dim], (dim,)) for dim in region.measured)
    if region.kind in ("contraction", "attention"):
        columns, parts = merged("n"), tuple[tuple[Loop, ...], ...]()
        if region.kind == "contraction" and len(region.parts) > 1:
            parts = tuple(tuple(loop for loop in columns if loop.dims[0] in part[0].axes) for part in region.parts)
        ranks = {"rank": merged("r"), "value_rank": merged("v")}
        return Loops(merged("m"), columns, merged("b"), merged("k"), merged("s"), measured, parts=parts, **ranks)
    rows, columns = merged("i"), merged("r")
    if region.reduced and not sweep:
        return Loops(rows, columns, measured=measured)
    return Loops(rows[:-1], rows[-1:], contracted=columns, measured=measured)


def _follow(layout: Layout, first: Dim, second: Dim, contiguous: bool) -> bool:
    """Whether a tensor has neither loop, or the second one right behind the first."""
    axes = [tuple(dim for axis in layout for dim in axis)] if contiguous else layout
    flat = [dim for axis in axes for dim in axis]
    if first not in flat and second not in flat:
        return True
    return any((first, second) in zip(axis, axis[1:], strict=False) for axis in axes)


def sizes_of(region: Region, tensors: Iterable[Tensor], given: Mapping[Value, torch.Tensor]) -> dict[Dim, int]:
    """How many indices each loop has, from the shapes of what is read; raises FusionError where these do not fit."""
    read = [tensor for tensor in tensors if tensor.value in given]
    found = {dim: int(dim.size) for dim in region.sized if is_static(dim.size)}
    bindings: dict[Any, int] = {}
    for tensor in read:
        if given[tensor.value].dim() != len(tensor.layout):
            axes = f"{given[tensor.value].dim()} axes where its kernel expects {len(tensor.layout)}"
            raise FusionError(f"{tensor.name} has {axes}")
        solve_bindings(tensor.value.shape, given[tensor.value].shape, bindings)
        for axis, size in zip(tensor.layout, given[tensor.value].shape, strict=True):
            unknown = [dim for dim in axis if dim not in found]
            known = math.prod(found.get(dim, 1) for dim in axis)
            if len(unknown) == 1:
                found[unknown[0]] = size // max(known, 1)
                known *= found[unknown[0]]
            if unknown[1:] or known != size:
                raise FusionError(f"{tensor.name} has {size} indices where its kernel expects {known}")
    for joint, length in region.lengths.items():
        if all(part in found for part, _ in length.sizes):
            together = length.start(found)
            if found.setdefault(joint, together) != together:
                raise FusionError(f"segments have {together} indices where their kernel expects {found[joint]}")
    found.update((dim, int(evaluate(dim.size, bindings))) for dim in region.sized if dim not in found)
    return found


def strides_of(tensor: Tensor, given: torch.Tensor, sizes: Mapping[Dim, int]) -> dict[Dim, int]:
    """How far apart in memory what is read is for neighbouring indices of each loop."""
    strides = _own_strides(tensor, given, sizes)
    found = {dim: strides[dim] for dim in tensor.picked}
    for dim, place in tensor.places.items():
        for loop, step in place.steps:
            found[loop] = found.get(loop, 0) + step * strides[dim]
    return found


def start_of(tensor: Tensor, given: torch.Tensor, sizes: Mapping[Dim, int]) -> int:
    """Where in memory what is read lies at the first index of all loops, counted from the first entry of the tensor."""
    strides = _own_strides(tensor, given, sizes)
    return sum(strides[dim] * place.start(sizes) for dim, place in tensor.places.items())


def _own_strides(tensor: Tensor, given: torch.Tensor, sizes: Mapping[Dim, int]) -> dict[Dim, int]:
    found: dict[Dim, int] = {}
    for axis, stride in zip(tensor.layout, given.stride(), strict=True):
        for dim in reversed(axis):
            found[dim] = stride
            stride *= sizes[dim]
    return found


def fits(loop: Loop, strides: Mapping[Dim, int], sizes: Mapping[Dim, int]) -> bool:
    """Whether a tensor with these strides has the parts of a loop one behind the other."""
    pairs = zip(loop.dims, loop.dims[1:], strict=False)
    return all(strides[first] == strides[second] * sizes[second] for first, second in pairs)
