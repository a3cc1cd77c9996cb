"""Values with the indices that their axes are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from regauge.ir.graph import Value
from regauge.passes.deriving.expressions import Axes, Axis, Index


@dataclass(frozen=True)
class Laid:
    """A value, and the indices that its axes are made of."""

    value: Value
    axes: Axes

    @property
    def flat(self) -> Axis:
        return tuple(index for axis in self.axes for index in axis)


def has_whole(axes: Axes, indices: Iterable[Index]) -> bool:
    """Whether each axis has all of its indices among these, or none."""
    given = set(indices)
    return all(given.issuperset(axis) or not given & set(axis) for axis in axes)
