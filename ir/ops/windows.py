"""Options of sliding windows: strides, paddings, dilations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regauge.ir.scalars import Along, Place
from regauge.ir.sizes.expressions import Size, floor_divide


def per_axis(value: Any, count: int) -> tuple[Any, ...]:
    """A window option as one number per spatial axis: torch writes one number, or a list of one, for all of them."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * count if len(values) == 1 else values


def window_counts(
    sizes: Sequence[Size], kernel: Sequence[Any], *, stride: Any, padding: Any, dilation: Any
) -> list[Size] | None:
    """How many windows fit along each axis; None where a kernel's size is no number, or a window fits nowhere."""
    options = zip(*(per_axis(one, len(sizes)) for one in (stride, padding, dilation)), strict=True)
    found: list[Size] = []
    for size, extent, (step, pad, spread) in zip(sizes, kernel, options, strict=True):
        if not isinstance(extent, int) or min(step, spread, extent) < 1 or pad < 0:
            return None
        room = size + 2 * pad - spread * (extent - 1) - 1
        if isinstance(room, int) and room < 0:
            return None
        found.append(floor_divide(room, step) + 1)
    return found


def window_places(inner: Sequence[Along], *, stride: Any, padding: Any, dilation: Any = 1) -> dict[int, Place]:
    """Where windows over the last axes read: ``inner`` are their own indices, one for each of these axes."""
    options = zip(*(per_axis(one, len(inner)) for one in (stride, padding, dilation)), strict=True)
    return {
        axis - len(inner): Place(((Along(axis - len(inner)), step), (own, spread)), -pad)
        for axis, (own, (step, pad, spread)) in enumerate(zip(inner, options, strict=True))
    }
