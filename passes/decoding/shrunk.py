"""CSKV (Wang et al. 2024): older keys and values as latents of few channels, those of the latest positions whole.

x [..., heads * size]  ->  z = D x + d  [..., rank],  kept in half precision or as codes in ranges of a latent over the
positions of a block;  back: U z + u

The paper finds D and U for the layers that make keys and values, by training against what these give, and keeps a
window that moves with each position. Here D and U are the best ones in closed form, for what attention reads, in the
metric of the outputs' gradients (for values that is the same map: the best of rank r of W x is U D (W x)), and the
window is the block that is not full. As in the paper keys are shrunk before they are rotated, which is done at steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from regauge.ir.edit import Builder
from regauge.ir.errors import PassError
from regauge.ir.graph import Parameter, Value
from regauge.passes.allocation.knapsack import BINS, Table
from regauge.passes.decoding.block_ranges import BlockRanges
from regauge.passes.decoding.kept_samples import Sample
from regauge.passes.factorization.metric_svd import Factored, factored

_RIDGE = 1e-4  # of the mean squared gradient
_RANGE_BYTES = 4  # of a latent and a block: lowest number and step, in half precision

FLOAT_BITS = 16  # of latents that are no codes


class Bases(NamedTuple):
    """``down`` [rank, channels] and ``shift`` [rank], ``up`` [channels, rank] and ``mean`` [channels]."""

    down: Parameter
    shift: Parameter
    up: Parameter
    mean: Parameter


@dataclass(frozen=True)
class Shrunk:
    """A coder of blocks by ``bases`` of all heads side by side: these are the axis ``heads`` of what is kept, if any.
    Without ``ranges`` latents are floats of half precision."""

    bases: Bases
    heads: int | None
    ranges: BlockRanges | None

    def codes(self, build: Builder, x: Value) -> tuple[Value, ...]:
        if self.heads is not None:
            x = build.permute(x, dims=_heads_last(x.rank, self.heads))
            x = build.reshape(x, shape=(*x.shape[:-2], int(self.bases.mean.shape[0])))
        latent = build.linear(x, self.bases.down, self.bases.shift)
        return (build.cast(latent, dtype=torch.float16),) if self.ranges is None else self.ranges.codes(build, latent)

    def back(self, build: Builder, codes: tuple[Value, ...], channels: int) -> Value:
        if self.ranges is None:
            latent = build.cast(codes[0], dtype=torch.float32)
        else:
            latent = self.ranges.back(build, codes, int(self.bases.down.shape[0]))
        x: Value = build.linear(latent, self.bases.up, self.bases.mean)
        if self.heads is not None:
            x = build.reshape(x, shape=(*x.shape[:-1], int(self.bases.mean.shape[0]) // channels, channels))
            order = _heads_last(x.rank, self.heads)
            x = build.permute(x, dims=tuple(order.index(axis) for axis in range(x.rank)))
        return x


def heads_axis(x: Value) -> int | None:
    """The axis of heads of what attention reads [..., heads, positions, channels], if it has one."""
    axis = x.rank - 3
    return axis if axis > 0 and isinstance(x.shape[axis], int) else None


def _heads_last(rank: int, heads: int) -> tuple[int, ...]:
    """Heads behind the positions, in front of their channels."""
    return (*(axis for axis in range(rank - 1) if axis != heads), heads, rank - 1)


@dataclass(frozen=True)
class Shrinking:
    """How keys or values are best shrunk: factors of every rank, and the mean of channels."""

    factors: Factored
    mean: torch.Tensor

    @property
    def channels(self) -> int:
        return len(self.mean)

    def parameters(self, build: Builder, rank: int) -> tuple[str, ...]:
        """The names of the four tensors of a :class:`Shrunk`, made in the graph."""
        up, down = self.factors.of_rank(rank)
        tensors = {"down": down, "shift": -(down @ self.mean), "up": up, "mean": self.mean}
        return tuple(build.constant(own.float().contiguous(), f"cache_{name}").name for name, own in tensors.items())


def shrinking(value: Value, sample: Sample) -> Shrinking:
    """Of what attention reads, in the metric of the gradients at all positions."""
    heads = heads_axis(value)
    x, gradient = (_side_by_side(part, heads).double() for part in (sample.tensor, sample.gradient))
    mean, metric = x.mean(0), gradient.T @ gradient / len(gradient)
    metric += torch.eye(len(metric), dtype=metric.dtype) * (_RIDGE * metric.diagonal().mean() + 1e-300)
    centred = x - mean
    return Shrinking(factored(torch.eye(len(mean), dtype=x.dtype), centred.T @ centred, metric), mean)


def chosen_ranks(found: Mapping[str, Shrinking], bits: int, block: int, allowed: float | None) -> dict[str, int]:
    """The rank of each, so that least is lost within ``allowed`` bytes per position; without, half of the channels.

    Raises PassError where rank 1 of all of them takes more.
    """
    if allowed is None:
        return {name: max(1, own.channels // 2) for name, own in found.items()}
    costs = [np.array([latent_bytes(r, bits, block) for r in range(1, own.channels + 1)]) for own in found.values()]
    losses = [own.factors.tail[1 : own.channels + 1].numpy() for own in found.values()]
    scaled = [np.ceil(own * (BINS / allowed) - 1e-9).astype(np.int64) for own in costs]
    places = Table(scaled, losses, BINS).solution(BINS)
    if places is None:
        least = sum(float(own.min()) for own in costs)
        raise PassError(f"kv-quantize: {allowed:,.0f} bytes cannot be met: latents of rank 1 take {least:,.0f}")
    return {name: place + 1 for name, place in zip(found, places, strict=True)}


def latent_bytes(rank: int, bits: int, block: int) -> float:
    """What a position of a full block takes."""
    return -(-rank * bits // 8) + (0 if bits == FLOAT_BITS else rank * _RANGE_BYTES / block)


def latent_ranges(bits: int, block: int) -> BlockRanges | None:
    """Latents differ in size from one to the next, of keys and of values: each has a range over the positions."""
    return None if bits == FLOAT_BITS else BlockRanges(bits, -2, block)


def _side_by_side(tensor: torch.Tensor, heads: int | None) -> torch.Tensor:
    """[positions of all sequences, channels of all heads]."""
    if heads is None:
        return tensor.flatten(0, -2)
    return tensor.permute(_heads_last(tensor.dim(), heads)).flatten(-2).flatten(0, -2)
