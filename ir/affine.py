"""Places on an axis as affine functions of loops: ``2 * i + k - 1``, and sizes of other axes among the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from regauge.ir.dims.extents import Dim

Terms = tuple[tuple[Dim, int], ...]


@dataclass(frozen=True, slots=True)
class Affine:
    """The sum of loops times steps, of how many indices Dims have times numbers, and of ``offset``."""

    steps: Terms = ()
    sizes: Terms = ()
    offset: int = 0

    @property
    def dims(self) -> frozenset[Dim]:
        """The loops that it depends on."""
        return frozenset(dim for dim, _ in self.steps)

    @property
    def shifts(self) -> bool:
        """Whether it is anything but zero where all loops are at their first index."""
        return bool(self.sizes or self.offset)

    def __add__(self, other: Affine) -> Affine:
        steps, sizes = _together(self.steps + other.steps), _together(self.sizes + other.sizes)
        return Affine(steps, sizes, self.offset + other.offset)

    def __sub__(self, other: Affine) -> Affine:
        return self + other.times(-1)

    def times(self, number: int) -> Affine:
        steps, sizes = (tuple((dim, number * n) for dim, n in terms) for terms in (self.steps, self.sizes))
        return Affine(_together(steps), _together(sizes), number * self.offset)

    def at(self, moved: Mapping[Dim, Affine]) -> Affine:
        """The same place where loops are what ``moved`` says."""
        found = Affine((), self.sizes, self.offset)
        for dim, step in self.steps:
            found += moved[dim].times(step) if dim in moved else Affine(((dim, step),))
        return found

    def start(self, sizes: Mapping[Dim, int]) -> int:
        """Where it is while all loops are at their first index."""
        return self.offset + sum(number * sizes[dim] for dim, number in self.sizes)


def index_of(dim: Dim) -> Affine:
    """The index of a loop."""
    return Affine(((dim, 1),))


def length_of(dims: Iterable[Dim]) -> Affine:
    """How many indices Dims that are laid end to end have."""
    return Affine((), _together(tuple((dim, 1) for dim in dims)))


def _together(terms: Terms) -> Terms:
    """Each Dim once, and none that cancels out."""
    found: dict[Dim, int] = {}
    for dim, number in terms:
        found[dim] = found.get(dim, 0) + number
    return tuple((dim, number) for dim, number in found.items() if number)
