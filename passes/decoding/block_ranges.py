"""Blocks of positions as integers of few bits, with ranges over positions or over channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import Size, divide
from regauge.passes.decoding.quantized_cache import LEAST, packed, unpacked


class BlockCoder(Protocol):
    """A way to keep full blocks of positions [..., blocks, block, channels] (float32) in little room."""

    def codes(self, build: Builder, x: Value) -> tuple[Value, ...]:
        """What is kept of it: each with the axis of blocks third from the end."""

    def back(self, build: Builder, codes: tuple[Value, ...], channels: int) -> Value:
        """[..., blocks, block, channels] again."""


@dataclass(frozen=True)
class BlockRanges:
    """Integers of ``bits`` bits between the ends of ranges, over each ``group`` entries along an axis: -2 for ranges of
    a channel over positions, -1 for ranges of a position over channels."""

    bits: int
    axis: int
    group: int

    def codes(self, build: Builder, x: Value) -> tuple[Value, ...]:
        shape, levels = x.shape, float(2**self.bits - 1)
        grouped, axis = self._grouped(build, x)
        low = build.amin(grouped, dims=(axis,), keepdim=True)
        span = build.sub(build.amax(grouped, dims=(axis,), keepdim=True), low)
        scale = build.clamp(build.div(span, levels), LEAST, None)
        kept = [build.cast(part, dtype=torch.float16) for part in (scale, low)]
        scale, low = (build.cast(part, dtype=torch.float32) for part in kept)
        numbers = build.clamp(build.round(build.div(build.sub(grouped, low), scale)), 0.0, levels)
        numbers = packed(build, build.reshape(numbers, shape=shape), self.bits)
        lead = shape[:-2]
        return (numbers, *(build.reshape(part, shape=(*lead, *self._ranges(shape))) for part in kept))

    def back(self, build: Builder, codes: tuple[Value, ...], channels: int) -> Value:
        numbers = build.cast(unpacked(build, codes[0], self.bits, channels), dtype=torch.float32)
        shape = numbers.shape
        grouped, axis = self._grouped(build, numbers)
        ranges = tuple(1 if place == axis else size for place, size in enumerate(grouped.shape))
        scale, low = (build.cast(build.reshape(part, shape=ranges), dtype=torch.float32) for part in codes[1:])
        return build.reshape(build.add(build.mul(grouped, scale), low), shape=shape)  # type: ignore[no-any-return]

    def _grouped(self, build: Builder, x: Value) -> tuple[Value, int]:
        """With the axis parted into groups, and the axis inside a group."""
        *lead, block, channels = x.shape
        if self.axis == -2:
            shape = (*lead, divide(block, self.group), self.group, channels)
        else:
            shape = (*lead, block, divide(channels, self.group), self.group)
        return build.reshape(x, shape=shape), len(shape) + self.axis

    def _ranges(self, shape: tuple[Size, ...]) -> tuple[Size, ...]:
        """The shape of the ranges of a block."""
        block, channels = shape[-2:]
        if self.axis == -2:
            return divide(block, self.group) or 1, channels
        return block, divide(channels, self.group) or 1
