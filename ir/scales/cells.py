"""The parts of a value that have scales of their own: its segments, where an axis is laid out end to end.

``concat`` of three values along their channels has three parts, and so has whatever is added to it; a slice that takes
one of them has that one's scale. Which part of an operand goes into which part of a result is read off the Dims that
both have: parts on whose segments there is no Dim in common do not meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from regauge.ir.dims.extents import Concat, Dim, leaves, resolve, size_of

if TYPE_CHECKING:
    from regauge.ir.dims.axes import Analysis
    from regauge.ir.graph import Value

MOST = 64  # parts of one value; beyond that the other axes count as wholes


class Cell(NamedTuple):
    """A part of a value: the segment of each axis that is laid out in segments."""

    value: Value
    segments: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """The parts of one value. ``axes`` are those in segments, ``dims`` the Dims of the segments of each."""

    cells: tuple[Cell, ...]
    axes: tuple[int, ...]
    dims: tuple[tuple[frozenset[Dim], ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    on_axes: tuple[frozenset[Dim], ...]  # all Dims of each axis that is in segments
    all_dims: frozenset[Dim]
    whole: frozenset[Dim]  # of the axes that are not in segments

    def of(self, cell: Cell) -> frozenset[Dim]:
        """The Dims of a part."""
        return self.whole.union(*(own[segment] for own, segment in zip(self.dims, cell.segments, strict=True)))

    def places(self, cell: Cell) -> list[tuple[int, slice]]:
        """Where a part lies: axes and the positions on them."""
        found = []
        for axis, sizes, segment in zip(self.axes, self.sizes, cell.segments, strict=True):
            start = sum(sizes[:segment])
            found.append((axis, slice(start, start + sizes[segment])))
        return found


Part: TypeAlias = tuple[Layout, Cell]


def layout_of(value: Value, analysis: Analysis) -> Layout:
    """The parts of a value, by the extents of its axes."""
    axes: list[int] = []
    dims: list[tuple[frozenset[Dim], ...]] = []
    sizes: list[tuple[int, ...]] = []
    whole: set[Dim] = set()
    count = 1
    for axis, extent in enumerate(analysis.of[value]):
        found = resolve(extent)
        segments = found.segments if isinstance(found, Concat) else ()
        lengths = [size_of(segment) for segment in segments]
        told_apart = all(isinstance(n, int) and n > 1 for n in lengths)  # one of a single index has no Dim
        if len(segments) < 2 or count * len(segments) > MOST or not told_apart:
            whole.update(leaves(found))
            continue
        count *= len(segments)
        axes.append(axis)
        dims.append(tuple(frozenset(leaves(segment)) for segment in segments))
        sizes.append(tuple(int(n) for n in lengths))
    cells = tuple(Cell(value, chosen) for chosen in product(*(range(len(own)) for own in dims)))
    on_axes = tuple(frozenset[Dim]().union(*own) for own in dims)
    all_dims = frozenset(whole.union(*on_axes))
    return Layout(cells, tuple(axes), tuple(dims), tuple(sizes), on_axes, all_dims, frozenset(whole))


@dataclass(frozen=True)
class Meeting:
    """Which parts of the values of one node go together; on axes that hold ``mixed`` Dims all do."""

    mixed: frozenset[Dim]

    def meet(self, first: Part, second: Part) -> bool:
        return self._admits(first, second) and self._admits(second, first)

    def among(self, layouts: Iterable[Layout], given: Part) -> list[Part]:
        """The parts of some values that go with a given one."""
        parts = ((layout, cell) for layout in layouts for cell in layout.cells)
        return [part for part in parts if self.meet(part, given)]

    def together(self, choices: Sequence[Sequence[Part]]) -> Iterator[tuple[Part, ...]]:
        """One part of each list, such that all go together."""
        for chosen in product(*choices):
            if all(self.meet(a, b) for a, b in combinations(chosen, 2)):
                yield chosen

    def _admits(self, part: Part, beside: Part) -> bool:
        (layout, cell), (other, other_cell) = part, beside
        for own, everything, segment in zip(layout.dims, layout.on_axes, cell.segments, strict=True):
            if not everything.isdisjoint(self.mixed) or everything.isdisjoint(other.all_dims):
                continue
            if own[segment].isdisjoint(other.of(other_cell)):
                return False
        return True
