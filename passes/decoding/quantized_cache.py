"""Values of a graph as integers of few bits and back, with a range for each position: what caches are kept as.

x [..., channels]  ->  y = (x - mean) / share                          statistics of channels, constants
                       low, scale = min(y), (max(y) - min(y)) / most   for each position and group of channels
                       codes = round((y - low) / scale), packed into bytes
and back               (codes * scale + low) * share + mean
"""

from __future__ import annotations

from dataclasses import dataclass

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


def write_quantized(graph: Graph, value: Value, bits: int, group: int, known: Channels | None, *, by: str) -> None:
    """Let whatever reads ``value`` read what is left of it in ``bits`` bits; ``group`` channels share a range."""
    build, readers = Builder(graph, by=by), list(value.uses)
    assert value.producer is not None and isinstance(value.dtype, torch.dtype)
    with build.at(value.producer):
        x = value if value.dtype == torch.float32 else build.cast(value, dtype=torch.float32)
        mean, share = (
            (None, None)
            if known is None
            else (build.constant(known.mean.float(), "mean"), build.constant(known.share.float(), "share"))
        )
        if known is not None:
            x = build.div(build.sub(x, mean), share)
        y = _back_and_forth(build, x, bits, group)
        if known is not None:
            y = build.add(build.mul(y, share), mean)
        if value.dtype != torch.float32:
            y = build.cast(y, dtype=value.dtype)
    for node, slot in readers:
        set_input(node, slot, y, graph)
    graph.outputs = [y if output is value else output for output in graph.outputs]
    graph.version += 1


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
    found = build.cast(_unpacked(build, _packed(build, codes, bits), bits, channels), dtype=torch.float32)
    if group < channels:
        found = build.reshape(found, shape=grouped.shape)
    found = build.add(build.mul(found, scale), low)
    whole: Value = build.reshape(found, shape=shape) if group < channels else found
    return whole


def _packed(build: Builder, codes: Value, bits: int) -> Value:
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


def _unpacked(build: Builder, packed: Value, bits: int, channels: int) -> Value:
    if bits == 8:
        return packed
    found: Value = build.unpack(packed, base=2**bits, count=8 // bits)
    if found.shape[-1] != channels:
        found = build.slice(found, dim=found.rank - 1, start=0, end=channels)
    return found
