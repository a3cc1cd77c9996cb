"""Values of a graph as integers of few bits and back, with a range for each position: what caches are kept as.

x [..., channels]  ->  y = (x - mean) / share                          statistics of channels, constants
                       low, scale = min(y), (max(y) - min(y)) / most   for each position and group of channels
                       codes = round((y - low) / scale), packed into bytes
and back               (codes * scale + low) * share + mean
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from regauge.ir.edit import Builder, set_input
from regauge.ir.graph import Graph, Value

LEAST = 6.2e-5  # of a scale: the least number that half precision holds in full


@dataclass(frozen=True)
class Channels:
    """What is known of the channels of a value: tensors that broadcast over it."""

    mean: torch.Tensor
    share: torch.Tensor


def balanced(mean: torch.Tensor, deviation: torch.Tensor, gradient: torch.Tensor) -> Channels:
    """Channels divided by the root of their deviation over what an error in them changes (root mean square gradient).

    That is half the way from equal ranges to errors that weigh equally, as SmoothQuant (Xiao et al. 2023) halves the
    way between activations and weights. Deviations come out as 1 on average.
    """
    gradient = gradient.clamp(min=float(gradient.max()) * 1e-3 + 1e-30)
    share = (deviation.clamp(min=float(deviation.max()) * 1e-3 + 1e-30) / gradient).sqrt()
    return Channels(mean, share * (deviation / share).mean().clamp(min=1e-30))


class Coder(Protocol):
    """A way to keep a value in few bits."""

    def back_and_forth(self, build: Builder, x: Value) -> Value:
        """What is left of ``x`` (float32), by codes that a cache finds smallest on the way; of the shape of x."""


@dataclass(frozen=True)
class Ranges:
    """Integers of ``bits`` bits between the ends of a range for each position and ``group`` neighbouring channels."""

    bits: int
    group: int
    known: Channels | None = None

    def back_and_forth(self, build: Builder, x: Value) -> Value:
        if self.known is None:
            return _back_and_forth(build, x, self.bits, self.group)
        mean, share = (build.constant(part.float(), "channels") for part in (self.known.mean, self.known.share))
        y = _back_and_forth(build, build.div(build.sub(x, mean), share), self.bits, self.group)
        return build.add(build.mul(y, share), mean)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Rotated:
    """Channels in another ``order`` [channels], turned in runs by an orthogonal ``matrix`` [size, size] before a coder.

    ``mean`` [channels], in the new order, is taken away first.
    """

    order: torch.Tensor
    matrix: torch.Tensor
    mean: torch.Tensor
    inner: Coder

    def back_and_forth(self, build: Builder, x: Value) -> Value:
        last, size, shape = x.rank - 1, len(self.matrix), x.shape
        parted = (*shape[:-1], int(shape[-1]) // size, size)
        mean = build.constant(self.mean.float(), "means")
        there, back = (build.constant(part, "order") for part in (self.order, self.order.argsort()))
        y = build.sub(build.index_select(x, there, dim=last), mean)
        turned = build.matmul(
            build.reshape(y, shape=parted), build.constant(self.matrix.T.float().contiguous(), "turn")
        )
        left = self.inner.back_and_forth(build, build.reshape(turned, shape=shape))
        y = build.matmul(build.reshape(left, shape=parted), build.constant(self.matrix.float().contiguous(), "turn"))
        y = build.add(build.reshape(y, shape=shape), mean)
        return build.index_select(y, back, dim=last)  # type: ignore[no-any-return]


def write_coded(build: Builder, value: Value, coder: Coder) -> None:
    """Let whatever reads ``value`` in the graph of ``build`` read what a coder leaves of it."""
    graph, readers = build.graph, list(value.uses)
    assert value.producer is not None and isinstance(value.dtype, torch.dtype)
    with build.at(value.producer):
        y = coded(build, value, coder)
    for node, slot in readers:
        set_input(node, slot, y, graph)
    graph.outputs = [y if output is value else output for output in graph.outputs]
    graph.version += 1


def coded(build: Builder, value: Value, coder: Coder) -> Value:
    """What a coder leaves of a value of any floating point type."""
    if value.dtype == torch.float32:
        return coder.back_and_forth(build, value)
    return build.cast(coder.back_and_forth(build, build.cast(value, dtype=torch.float32)), dtype=value.dtype)  # type: ignore[no-any-return]


def tried(coder: Coder, x: torch.Tensor) -> torch.Tensor:
    """What a coder leaves of a tensor."""
    graph = Graph("coder")
    build = Builder(graph)
    graph.outputs = [coded(build, build.input("x", x.shape, x.dtype), coder)]
    (found,) = graph.run([x])
    return found  # type: ignore[no-any-return]


def _back_and_forth(build: Builder, x: Value, bits: int, group: int) -> Value:
    shape, channels = x.shape, int(x.shape[-1])
    grouped: Value = build.reshape(x, shape=(*shape[:-1], channels // group, group)) if group < channels else x
    axis = grouped.rank - 1
    low = build.amin(grouped, dims=(axis,), keepdim=True)
    span = build.sub(build.amax(grouped, dims=(axis,), keepdim=True), low)
    scale = build.clamp(build.div(span, float(2**bits - 1)), LEAST, None)
    kept = [build.cast(part, dtype=torch.float16) for part in (scale, low)]
    scale, low = (build.cast(part, dtype=torch.float32) for part in kept)
    codes = build.clamp(build.round(build.div(build.sub(grouped, low), scale)), 0.0, float(2**bits - 1))
    if group < channels:
        codes = build.reshape(codes, shape=shape)
    found = build.cast(unpacked(build, packed(build, codes, bits), bits, channels), dtype=torch.float32)
    if group < channels:
        found = build.reshape(found, shape=grouped.shape)
    found = build.add(build.mul(found, scale), low)
    whole: Value = build.reshape(found, shape=shape) if group < channels else found
    return whole


def packed(build: Builder, codes: Value, bits: int) -> Value:
    """Codes, as floats, in bytes: the first of those that share one in its lowest bits."""
    count, channels = 8 // bits, int(codes.shape[-1])
    if count == 1:
        single: Value = build.cast(codes, dtype=torch.uint8)
        return single
    missing = -channels % count
    if missing:
        codes = build.pad(codes, pads=(*((0, 0) for _ in codes.shape[:-1]), (0, missing)))
    shape = (*codes.shape[:-1], (channels + missing) // count, count)
    powers = build.constant(torch.tensor([float(2 ** (bits * place)) for place in range(count)]), "powers")
    digits = build.mul(build.reshape(codes, shape=shape), powers)
    found: Value = build.cast(build.sum(digits, dims=(len(shape) - 1,)), dtype=torch.uint8)
    return found


def unpacked(build: Builder, packed: Value, bits: int, channels: int) -> Value:
    if bits == 8:
        return packed
    found: Value = build.unpack(packed, base=2**bits, count=8 // bits)
    if found.shape[-1] != channels:
        found = build.slice(found, dim=found.rank - 1, start=0, end=channels)
    return found
