"""Times on a GPU: what can be said of them without one."""

from typing import Any

import pytest
import torch

from regauge.backends.gpu_timing import Spread, copies_for, rotating, times
from regauge.ir.errors import RegaugeError


def test_a_spread_is_the_median_and_the_tenths_around_it() -> None:
    spread = Spread.of([float(n) for n in range(1, 100)])
    assert (spread.p10, spread.median, spread.p90) == (10, 50, 90)
    assert Spread.of([2.0]) == Spread(2, 2, 2)


def test_data_rotates_through_more_than_four_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.zeros(1000, device="meta"), torch.zeros(250, device="meta")]  # 5000 bytes
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Card", (), {"L2_cache_size": 12_000}))
    assert copies_for(tensors) == 11 and len(rotating(tensors)) == 11  # 55000 bytes, 48000 are four caches


class Clock:
    """Of a device on which a run of one call takes a second for each entry of its argument."""

    now = 0.0

    def __init__(self, **_: object) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = Clock.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Clock") -> float:
        return 1e3 * (other.at - self.at)


class Graph:
    """A capture runs the calls, and is run again as a whole."""

    captured: list[float] = []

    def __enter__(self) -> None:
        self.start = Clock.now

    def __exit__(self, *_: object) -> None:
        Graph.captured.append(Clock.now - self.start)

    def replay(self) -> None:
        Clock.now += Graph.captured[-1]


def run_on_a_made_up_device(monkeypatch: pytest.MonkeyPatch, calls: list[Any], data: list[Any]) -> list[Spread]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    Graph.captured = []
    return times(calls, data)


def takes(seconds: float) -> Any:
    def call(tensor: torch.Tensor) -> None:
        Clock.now += seconds * tensor.numel()

    return call


def test_times_are_those_of_one_call_and_short_ones_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [[torch.zeros(1)], [torch.zeros(3)]]
    short, long = run_on_a_made_up_device(monkeypatch, [takes(1e-5), takes(1.0)], data)
    assert short.median == pytest.approx(2e-5) and long.median == pytest.approx(2.0)
    assert len(Graph.captured) == 1 and Graph.captured[0] == pytest.approx(4e-3, rel=0.05)


def test_what_cannot_be_captured_is_timed_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("it copies to the host")

    monkeypatch.setattr(Graph, "__enter__", refuse)
    (one,) = run_on_a_made_up_device(monkeypatch, [takes(1e-5)], [[torch.zeros(1)]])
    assert one.median == pytest.approx(1e-5) and not Graph.captured


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_told() -> None:
    with pytest.raises(RegaugeError, match="times of kernels are measured on a GPU"):
        times([torch.relu], [[torch.zeros(2)]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_work_takes_longer() -> None:
    x, y = torch.randn(2**16, device="cuda"), torch.randn(2**26, device="cuda")
    (short,), (long,) = (times([torch.relu], rotating([tensor])) for tensor in (x, y))
    assert 10 * short.median < long.median and short.p10 <= short.median <= short.p90
