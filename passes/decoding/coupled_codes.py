"""Coupled quantization: neighbouring channels share one code, the number of a vector in a table.

x [..., channels]  ->  y [..., channels / c, c];  code = argmin over the table's vectors of |(y - vector) * weight|,
one byte for c channels; back: the vector. There are no ranges: a position takes channels / c bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Value
from regauge.passes.decoding.kept_samples import Sample

VECTORS = 256  # of a table: what a byte numbers
_ROUNDS = 12
_MOST_ROWS = 4096  # that a table is made from
_AT_ONCE = 1 << 24  # distances
_NEVER = 1e30  # a distance at which no vector is taken


@dataclass(frozen=True)
class Coupled:
    """``table`` [..., channels / c, VECTORS, c] and ``weight`` [..., channels / c, 1, c]: what an error in a channel
    counts for; in front those axes of the value that are no positions or sequences, as heads: ``axes`` are these.
    ``used`` [..., channels / c, VECTORS] is false for vectors that stand there twice."""

    table: torch.Tensor
    weight: torch.Tensor
    used: torch.Tensor
    axes: tuple[int, ...]

    def back_and_forth(self, build: Builder, x: Value) -> Value:
        coupled, shape = int(self.table.shape[-1]), x.shape
        parted = (*shape[:-1], int(shape[-1]) // coupled, coupled)
        others = [axis for axis in range(x.rank - 1) if axis not in self.axes]
        order = (*self.axes, x.rank - 1, *others)  # tables first: one product of matrices for each
        # |y - t|^2 = |y|^2 - 2 (y t - |t|^2 / 2), channels weighed by squares
        lead = self.table.shape[:-2]
        batch = (*lead, *(1 for _ in others[1:]))
        against = (self.table * self.weight.square()).transpose(-1, -2).reshape(*batch, coupled, -1).float()
        half = ((self.table * self.weight).square().sum(-1) / 2).masked_fill(~self.used, _NEVER)
        y = build.permute(build.reshape(x, shape=parted), dims=(*order, x.rank))
        near = build.matmul(y, build.constant(against.contiguous(), "tables"))
        near = build.sub(near, build.constant(half.reshape(*batch, 1, -1).float(), "lengths"))
        found = build.argmax(near, dim=near.rank - 1)
        back = tuple(order.index(axis) for axis in range(x.rank))
        codes = build.cast(build.permute(build.cast(found, dtype=torch.uint8), dims=back), dtype=torch.int64)
        starts = torch.arange(prod(lead)).view(lead) * self.table.shape[-2]
        for axis in sorted(others):
            starts = starts.unsqueeze(axis)
        places = build.add(codes, build.constant(starts, "starts"))
        vectors = build.embedding(build.constant(self.table.flatten(0, -2).float().contiguous(), "tables"), places)
        return build.reshape(vectors, shape=shape)  # type: ignore[no-any-return]


def coupled_codes(sample: Sample, coupled: int) -> Coupled:
    """Tables for ``coupled`` channels each by k-means, in which positions and channels weigh as errors in them count.

    Weighted as in section 3.3 of Zhang et al. 2024 ("KV cache is 1 bit per channel"), by squared gradients of a
    position summed over the channels; besides, distances weigh channels by their mean squared gradient.
    """
    x, gradient = (sample.rows(part, _MOST_ROWS).double() for part in (sample.tensor, sample.gradient))
    lead = x.shape[:-2]  # axes of the value, rows, channels
    x, gradient = (
        part.reshape(*part.shape[:-1], -1, coupled).movedim(-2, -3).flatten(0, -3) for part in (x, gradient)
    )  # [tables, rows, c]
    square = gradient.square()
    weight = square.mean(1, keepdim=True)
    weight = (weight / weight.mean(-1, keepdim=True).clamp(min=1e-300)).clamp(min=1e-4).sqrt()
    counts = square.sum(-1)
    counts = counts.clamp(min=counts.mean(1, keepdim=True) * 1e-2) + 1e-300
    parts = -(-x.shape[0] * x.shape[1] * VECTORS // _AT_ONCE)
    made = [_k_means(*own) for own in zip((x * weight).chunk(parts), counts.chunk(parts), strict=True)]
    centres, used = map(torch.cat, zip(*made, strict=True))
    table, used = (centres / weight).view(*lead, -1, VECTORS, coupled), used.view(*lead, -1, VECTORS)
    return Coupled(table, weight.view(*lead, -1, 1, coupled), used, sample.axes)


def _k_means(x: torch.Tensor, weigh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of points [groups, n, c] the VECTORS centres [groups, VECTORS, c] of least weighted squared distance (Lloyd),
    and which of them are nearest to a point.

    Starts from points drawn by weight and distance (k-means++ in few draws: half at a time), so that none is far off.
    """
    generator = torch.Generator().manual_seed(0)
    x, weigh = x.float(), weigh.float()
    centres = _drawn(x, weigh, 2, generator)
    while centres.shape[1] < VECTORS:
        far = (weigh * _distances(x, centres).amin(-1)).clamp(min=1e-30)
        centres = torch.cat([centres, _drawn(x, far, centres.shape[1], generator)], 1)
    for _ in range(_ROUNDS):
        own = _distances(x, centres).argmin(-1)
        total = torch.zeros(centres.shape[:2]).scatter_add_(1, own, weigh)
        places = own[..., None].expand_as(x)
        summed = torch.zeros_like(centres).scatter_add_(1, places, x * weigh[..., None])
        centres = torch.where(total[..., None] > 0, summed / total[..., None].clamp(min=1e-30), centres)
    return centres.double(), total > 0


def _distances(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared, but for what is the same for all centres of a point; never below zero."""
    found = torch.baddbmm(centres.square().sum(-1)[:, None], x, centres.transpose(1, 2), alpha=-2)
    return (found + x.square().sum(-1, keepdim=True)).clamp(min=0)


def _drawn(x: torch.Tensor, weigh: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    places = torch.multinomial(weigh, count, replacement=True, generator=generator)
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
