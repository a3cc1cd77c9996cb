"""The loops that axes are made of: Dims, and one for each concatenation, wherever it stands."""

from __future__ import annotations

from typing import Any

from regauge.ir.dims.extents import Concat, Dim, Extent, Product, resolve, size_of


class Atoms:
    """Reads extents as products of loops."""

    def __init__(self) -> None:
        self._joints: dict[Any, Dim] = {}

    def of(self, extent: Extent) -> tuple[Dim, ...]:
        """The loops of an axis, the slowest first; none for an axis of size 1."""
        found = resolve(extent)
        if isinstance(found, Dim):
            return (found,)
        if isinstance(found, Product):
            return tuple(dim for factor in found.factors for dim in self.of(factor))
        return (self._joint(found),)

    def _joint(self, extent: Concat) -> Dim:
        key = _layout(extent)
        if key not in self._joints:
            self._joints[key] = Dim(size_of(extent))
        return self._joints[key]


def _layout(extent: Extent) -> Any:
    """What two extents in normal form have in common where they are laid out alike."""
    if isinstance(extent, Dim):
        return extent
    parts = extent.factors if isinstance(extent, Product) else extent.segments
    return type(extent), tuple(map(_layout, parts))
