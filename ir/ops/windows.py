"""Options of sliding windows: strides, paddings, dilations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def per_axis(value: Any, count: int) -> tuple[Any, ...]:
    """A window option as one number per spatial axis: torch writes one number, or a list of one, for all of them."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * count if len(values) == 1 else values
