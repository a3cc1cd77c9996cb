"""GEAR (Kang et al. 2024): blocks as codes, a map of low rank for what these miss, and outliers apart.

x = S + Q + A B' + rest     S  the greatest and least entries of each range, with their places
                            Q  codes of x - S, in ranges
                            A [block, rank], B [channels, rank]  of x - S - Q, by a few power iterations (Algorithm 1)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Value
from regauge.passes.decoding.block_ranges import BlockRanges

_ROUNDS = 2
_LEAST = 1e-12


@dataclass(frozen=True)
class Gear:
    """``ranges`` code blocks of ``block`` positions and ``channels``; ``outliers`` is a share of entries (paper: 2 %)
    and ``rank`` that of each head's map (paper: 4 for a prompt, 2 for what is decoded)."""

    ranges: BlockRanges
    block: int
    channels: int
    outliers: float = 0.02
    rank: int = 2

    def codes(self, build: Builder, x: Value) -> tuple[Value, ...]:
        sparse: list[Value] = []
        for largest in (True, False):
            found, places = build.topk(x, k=self._count(), dim=self._axis(x), largest=largest)
            sparse += [build.cast(found, dtype=torch.float16), build.cast(places, dtype=self._index())]
        inner = build.sub(x, self._outliers(build, x, sparse))
        numbers = self.ranges.codes(build, inner)
        missed = build.sub(inner, self.ranges.back(build, numbers, self.channels))
        return (*sparse, *(build.cast(part, dtype=torch.float16) for part in self._low_rank(build, missed)), *numbers)

    def back(self, build: Builder, codes: tuple[Value, ...], channels: int) -> Value:
        a, b = (build.cast(part, dtype=torch.float32) for part in codes[4:6])
        found = build.add(self.ranges.back(build, codes[6:], channels), build.matmul(a, b))
        whole: Value = build.add(found, self._outliers(build, found, codes[:4]))
        return whole

    def _outliers(self, build: Builder, like: Value, sparse: list[Value] | tuple[Value, ...]) -> Value:
        """They at their places, and zeros."""
        found: Value = build.mul(like, 0.0)
        for values, places in (sparse[:2], sparse[2:4]):
            values, places = build.cast(values, dtype=torch.float32), build.cast(places, dtype=torch.int64)
            found = build.scatter(found, places, values, dim=self._axis(like))
        return found

    def _low_rank(self, build: Builder, x: Value) -> tuple[Value, Value]:
        """Orthonormal columns A [block, rank], and A' x."""
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(self.channels, self.rank, generator=generator)
        turned = build.permute(x, dims=(*range(x.rank - 2), x.rank - 1, x.rank - 2))
        b: Value = build.constant(start, "start")
        for _ in range(_ROUNDS):
            a = self._orthonormal(build, build.matmul(x, b))
            b = build.matmul(turned, a)
        return a, build.permute(b, dims=(*range(b.rank - 2), b.rank - 1, b.rank - 2))

    def _orthonormal(self, build: Builder, x: Value) -> Value:
        """Its columns, one after the other without what they have in common with those before (Gram-Schmidt)."""
        last, columns = x.rank - 1, list[Value]()
        for place in range(self.rank):
            own = build.slice(x, dim=last, start=place, end=place + 1)
            for other in columns:
                shared = build.sum(build.mul(own, other), dims=(last - 1,), keepdim=True)
                own = build.sub(own, build.mul(other, shared))
            square = build.sum(build.mul(own, own), dims=(last - 1,), keepdim=True)
            columns.append(build.div(own, build.sqrt(build.add(square, _LEAST))))
        return columns[0] if len(columns) == 1 else build.concat(*columns, dim=last)

    def _axis(self, x: Value) -> int:
        return x.rank + self.ranges.axis

    def _count(self) -> int:
        """Of the entries along the axis of ranges as many at each end."""
        return max(1, round(self.outliers / 2 * (self.block if self.ranges.axis == -2 else self.channels)))

    def _index(self) -> torch.dtype:
        return torch.uint8 if max(self.block, self.channels) <= 256 else torch.int16
