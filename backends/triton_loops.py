"""The loops of a kernel: neighbours that every tensor has, or lacks, one behind the other are one loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from regauge.ir.errors import FusionError
from regauge.ir.extents import Dim
from regauge.ir.fusion.region import Layout, Region
from regauge.ir.graph import Value
from regauge.ir.sizes import is_static


@dataclass(frozen=True)
class Loop:
    """Dims that a kernel goes through with one index, the slowest first.

    A segment of a loop, its ``joint``, begins where those ``before`` it end.
    """

    name: str
    dims: tuple[Dim, ...]
    joint: str = ""
    before: tuple[str, ...] = ()

    def size(self, sizes: Mapping[Dim, int]) -> int:
        return math.prod(sizes[dim] for dim in self.dims)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor that a kernel reads or writes, under a name of its own."""

    name: str
    value: Value
    layout: Layout
    axes: frozenset[Dim]

    def loops(self, loops: Iterable[Loop]) -> list[Loop]:
        """Those of the loops that the tensor has."""
        return [loop for loop in loops if loop.dims[0] in self.axes]


@dataclass(frozen=True, eq=False)
class Loops:
    """The loops of a kernel: ``rows``, and ``columns``, which are reduced where anything is.

    Of a contraction rows are those of its left factor and columns those of its right one; both factors have ``batch``
    and what is ``contracted``. Of attention these are queries, columns of values, heads, and what scores are summed
    over; keys and values have ``source``. ``segments`` are parts of rows or columns, end to end.
    """

    rows: tuple[Loop, ...]
    columns: tuple[Loop, ...]
    batch: tuple[Loop, ...] = ()
    contracted: tuple[Loop, ...] = ()
    segments: tuple[Loop, ...] = ()
    source: tuple[Loop, ...] = ()

    @cached_property
    def all(self) -> tuple[Loop, ...]:
        return (*self.batch, *self.rows, *self.columns, *self.contracted, *self.source, *self.segments)

    def of(self, tensor: Tensor, loops: Iterable[Loop]) -> list[Loop]:
        """Those of the loops that a tensor has, with segments for loops that it has segments of."""
        return tensor.loops([part for loop in loops for part in (loop, *self.parts(loop))])

    def parts(self, loop: Loop) -> list[Loop]:
        return [segment for segment in self.segments if segment.joint == loop.name]


def count(loops: Iterable[Loop], sizes: Mapping[Dim, int]) -> int:
    """How many indices loops have together."""
    return math.prod(loop.size(sizes) for loop in loops)


def loops_of(region: Region, tensors: Sequence[Tensor], *, contiguous: bool) -> Loops:
    """The loops of a region.

    With ``contiguous`` neighbouring axes of a tensor are taken for one, which its strides have to allow
    (:func:`fits`); else only parts of one axis are. A pointwise region has the last of its loops as columns.
    """

    layouts = [*(tensor.layout for tensor in tensors), *((t.value,) for t in region.terms if t.op == "index")]

    def merged(letter: str) -> tuple[Loop, ...]:
        groups: list[tuple[Dim, ...]] = []
        for dim in region.loops:
            if region.names[dim][0] != letter:
                continue
            apart = dim in region.joints or groups and groups[-1][-1] in region.joints
            if groups and not apart and all(_follow(layout, groups[-1][-1], dim, contiguous) for layout in layouts):
                groups[-1] = (*groups[-1], dim)
            else:
                groups.append((dim,))
        return tuple(Loop(region.names[dims[0]], dims) for dims in groups)

    segments = []
    for joint, parts in region.joints.items():
        names = [region.names[part] for part in parts]
        for place, part in enumerate(parts):
            segments.append(Loop(names[place], (part,), region.names[joint], tuple(names[:place])))
    if region.kind in ("contraction", "attention"):
        return Loops(merged("m"), merged("n"), merged("b"), merged("k"), tuple(segments), merged("s"))
    rows, columns = merged("i"), merged("r")
    if region.reduced:
        return Loops(rows, columns)
    return Loops(rows[:-1], rows[-1:], segments=tuple(segments))


def _follow(layout: Layout, first: Dim, second: Dim, contiguous: bool) -> bool:
    """Whether a tensor has neither loop, or the second one right behind the first."""
    axes = [tuple(dim for axis in layout for dim in axis)] if contiguous else layout
    flat = [dim for axis in axes for dim in axis]
    if first not in flat and second not in flat:
        return True
    return any((first, second) in zip(axis, axis[1:], strict=False) for axis in axes)


def sizes_of(
    tensors: Iterable[Tensor], given: Mapping[Value, torch.Tensor], joints: Mapping[Dim, Sequence[Dim]]
) -> dict[Dim, int]:
    """How many indices each loop has, from the shapes of what is read; raises FusionError where these do not fit."""
    found: dict[Dim, int] = {}
    read = [tensor for tensor in tensors if tensor.value in given]
    for tensor in read:
        found.update({dim: int(dim.size) for dim in tensor.axes if is_static(dim.size)})
    for tensor in read:
        for axis, size in zip(tensor.layout, given[tensor.value].shape, strict=True):
            unknown = [dim for dim in axis if dim not in found]
            known = math.prod(found.get(dim, 1) for dim in axis)
            if len(unknown) == 1:
                found[unknown[0]] = size // max(known, 1)
                known *= found[unknown[0]]
            if unknown[1:] or known != size:
                raise FusionError(f"{tensor.name} has {size} indices where its kernel expects {known}")
    for joint, parts in joints.items():
        together = sum(found[part] for part in parts)
        if found.setdefault(joint, together) != together:
            raise FusionError(f"segments have {together} indices where their kernel expects {found[joint]}")
    return found


def strides_of(tensor: Tensor, given: torch.Tensor, sizes: Mapping[Dim, int]) -> dict[Dim, int]:
    """How far apart in memory neighbouring indices of each loop are."""
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
