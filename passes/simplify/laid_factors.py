"""A scale and a shift laid out over the entries of a value, so that they can be followed through changes of layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regauge.ir.rewriting.rewrite import refuse
from regauge.ir.sizes.expressions import Size, same

MOST = 1 << 22  # entries over which a factor is laid out


@dataclass(frozen=True)
class Laid:
    """``scale * x + shift``: both have as many axes as x, of size one along those where all entries get the same."""

    scale: torch.Tensor
    shift: torch.Tensor

    def each(self, function: Callable[[torch.Tensor, float], torch.Tensor]) -> Laid:
        """``function`` of both, given with what does nothing in their place; axes of equal entries get size one."""
        return Laid(narrow(function(self.scale, 1.0)), narrow(function(self.shift, 0.0)))

    @property
    def scales(self) -> bool:
        return bool((self.scale != 1).any())

    @property
    def shifts(self) -> bool:
        return bool((self.shift != 0).any())


def narrow(tensor: torch.Tensor) -> torch.Tensor:
    for axis, size in enumerate(tensor.shape):
        first = tensor.narrow(axis, 0, 1) if size > 1 else tensor
        if size > 1 and bool((tensor == first).all()):
            tensor = first
    return tensor


def rounds(shift: torch.Tensor, dtype: Any) -> bool:
    """Whether what is added may be there to round to whole numbers: ``x + 2**23 - 2**23``."""
    return bool((shift.abs() * torch.finfo(dtype).eps >= 0.5).any())


def known_size(size: Size) -> int:
    return size if isinstance(size, int) else refuse("a factor cannot be laid out over a dynamic size")


def regrouped_factor(tensor: torch.Tensor, before: Sequence[Size], after: Sequence[Size]) -> torch.Tensor:
    """A factor of a value of shape ``before`` as one of the same entries in the shape ``after``."""
    if tensor.numel() == 1:
        return tensor.reshape((1,) * len(after))
    shortest, front, back = min(len(before), len(after)), 0, 0
    while front < shortest and same(before[front], after[front]):
        front += 1
    while back < shortest - front and same(before[-1 - back], after[-1 - back]):
        back += 1
    own, (start, end) = tensor.shape, (front, len(before) - back)
    middle = [known_size(size) for size in before[start:end]]
    if math.prod(own[:start]) * math.prod(middle) * math.prod(own[end:]) > MOST:
        return refuse("its factor would be laid out over too many entries")
    target = [known_size(size) for size in after[front : len(after) - back]]
    return tensor.expand(*own[:start], *middle, *own[end:]).reshape(*own[:start], *target, *own[end:])
