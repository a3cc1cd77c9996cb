"""The coder of a value that a cache keeps, by method, and the bits of several within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch

from regauge.ir.errors import PassError
from regauge.ir.graph import Value
from regauge.passes.allocation.knapsack import BINS, Table
from regauge.passes.base import GIVE_DATA
from regauge.passes.decoding.coupled_codes import coupled_codes
from regauge.passes.decoding.kept_samples import Sample
from regauge.passes.decoding.quantized_cache import Coder, Ranges, Rotated, tried
from regauge.passes.quantization.hadamard import spread

Method: TypeAlias = Literal["ranges", "rotated", "coupled"]

RANGE_BYTES = 4  # lowest number and step, in half precision


@dataclass(frozen=True)
class Coding:
    """How values are kept: ``group`` channels share a range, or are turned together."""

    method: Method
    group: int | None

    def widths(self) -> tuple[int, ...]:
        """The bits of a number that there are."""
        return (1, 2, 4, 8) if self.method == "coupled" else (2, 4, 8)

    def misfit(self, channels: int, bits: int) -> str | None:
        """Why a value of so many channels cannot be kept, or None."""
        if self.method == "coupled":
            coupled = 8 // bits
            return f"{coupled} coupled channels do not divide {channels}" if channels % coupled else None
        return f"{self.group} channels do not divide {channels}" if self.group and channels % self.group else None

    def bytes(self, value: Value, bits: int, size: int) -> float:
        """What a position takes; ``size`` is the channels of a head."""
        channels = int(value.shape[-1])
        heads = int(np.prod([axis for axis in value.shape[:-1] if isinstance(axis, int)]))
        ranges = 0 if self.method == "coupled" else channels // self._group(channels, size) * RANGE_BYTES
        return heads * (-(-channels * bits // 8) + ranges)

    def coder(self, value: Value, bits: int, size: int, sample: Sample | None) -> Coder:
        """Of a value; raises PassError where the method needs data and there is none."""
        channels = int(value.shape[-1])
        if self.method == "coupled":
            if sample is None:
                raise PassError(f"kv-quantize: method=coupled makes its tables from data: {GIVE_DATA}")
            return coupled_codes(sample, 8 // bits)
        group = self._group(channels, size)
        if self.method == "rotated":
            return _rotated(channels, group, bits, sample)
        return Ranges(bits, group, None if sample is None else sample.channels())

    def _group(self, channels: int, size: int) -> int:
        """The channels of a head where the value has those of several side by side."""
        return self.group or (size if size and channels % size == 0 else channels)


def _rotated(channels: int, group: int, bits: int, sample: Sample | None) -> Rotated:
    """Outlier-aware rotation (Su et al. 2025, RotateKV, section 4.1): channels in the order of their means, so that a
    Hadamard matrix turns neighbours that are alike; without data in the order in which they are."""
    order, mean = torch.arange(channels), torch.zeros(channels)
    if sample is not None:
        average = sample.tensor.double().flatten(0, -2).mean(0)
        order = average.argsort()
        mean = average[order]
    return Rotated(order, spread(group, torch.Generator().manual_seed(0)), mean, Ranges(bits, group))


def chosen_bits(coding: Coding, values: Sequence[tuple[Value, int, Sample]], allowed: float) -> list[tuple[int, Coder]]:
    """The bits of each value and its coder, so that least is lost of the outputs within ``allowed`` bytes.

    What a width loses of a value is measured on its sample, weighed by squared gradients; the knapsack of the shared
    allocator picks. Raises PassError where the fewest bits take more.
    """
    costs, losses, options = [], [], []
    for value, size, sample in values:
        widths = [bits for bits in coding.widths() if coding.misfit(int(value.shape[-1]), bits) is None]
        coders = [coding.coder(value, bits, size, sample) for bits in widths]
        options.append(list(zip(widths, coders, strict=True)))
        losses.append(np.array([sample.lost(tried(coder, sample.tensor)) for coder in coders]))
        costs.append(np.array([coding.bytes(value, bits, size) for bits in widths]))
    scaled = [np.ceil(own * (BINS / allowed) - 1e-9).astype(np.int64) for own in costs]
    found = Table(scaled, losses, BINS).solution(BINS)
    if found is None:
        least = sum(float(own.min()) for own in costs)
        raise PassError(f"kv-quantize: {allowed:,.0f} bytes cannot be met: the fewest bits take {least:,.0f}")
    return [own[place] for own, place in zip(options, found, strict=True)]
