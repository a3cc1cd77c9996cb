"""Times of calls on a GPU: events around many calls, in turns, on rotating data, so that the cache holds none of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from regauge.ir.errors import RegaugeError

Call: TypeAlias = Callable[..., Any]
SHORT = 1e-3
"""Seconds of a call, with what Python takes to launch it, below which calls are captured in a CUDA graph."""
CACHES = 4
"""Times the second-level cache that the data of rotating calls takes."""
_MOST_COPIES = 64
_ROUND = 4e-3  # seconds of one sample


@dataclass(frozen=True)
class Spread:
    """Seconds of one call: the median, and the tenth and ninetieth percentile of samples of many calls each."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        tenths = statistics.quantiles(samples, n=10) if len(samples) > 1 else [samples[0]] * 9
        return Spread(statistics.median(samples), tenths[0], tenths[-1])


def copies_for(tensors: Sequence[torch.Tensor]) -> int:
    """How many copies of what a call reads are more than CACHES times the cache of the device."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    device = tensors[0].device
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(_MOST_COPIES, 2 + CACHES * cache // max(1, size)) if cache else 1


def rotating(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors, and as many copies of them as the cache asks for."""
    return [list(tensors), *([t.clone() for t in tensors] for _ in range(copies_for(tensors) - 1))]


def times(
    calls: Sequence[Call], data: Sequence[Sequence[torch.Tensor]], rounds: int = 3, samples: int = 7
) -> list[Spread]:
    """The times of calls of the same arguments, in turns: in each round some samples of each.

    A sample goes through ``data``, a list of arguments for each call, as often as takes some milliseconds. Raises
    RegaugeError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RegaugeError("times of kernels are measured on a GPU, and there is none")
    runs = [_prepared(call, data) for call in calls]
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for own, (run, number) in zip(found, runs, strict=True):
            own.extend(_sample(run, number) for _ in range(samples))
    return [Spread.of(own) for own in found]


def _prepared(call: Call, data: Sequence[Sequence[torch.Tensor]]) -> tuple[Callable[[], None], int]:
    """A function that makes many calls, in a CUDA graph where they are short, and how many."""

    def once() -> None:
        for arguments in data:
            call(*arguments)

    for _ in range(3):
        once()
    seconds = _sample(once, len(data))
    repeats = max(1, min(100, int(_ROUND / max(seconds * len(data), 1e-9))))

    def many() -> None:
        for _ in range(repeats):
            once()

    if seconds > SHORT:
        return many, repeats * len(data)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            many()
    except RuntimeError:  # what copies to the host, or plans with it, cannot be captured
        torch.cuda.synchronize()
        return many, repeats * len(data)
    graph.replay()
    return graph.replay, repeats * len(data)


def _sample(run: Callable[[], None], number: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / number
