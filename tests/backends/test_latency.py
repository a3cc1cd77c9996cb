"""Measuring graphs: where they run, with what, and what is made of the times; never how long anything takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from regauge.backends import latency
from regauge.ir.errors import RegaugeError
from regauge.ir.graph import Graph
from regauge.ir.timing import Timing


def network() -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    return regauge.capture(model.eval(), (torch.randn(3, 8),), dynamic={0: {0: "batch"}})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "FEWEST", 2)
    monkeypatch.setattr(latency, "MOST", 3)


@pytest.mark.parametrize("inputs", [None, (torch.randn(5, 8),)])
def test_captured_graphs_run_in_torch_and_loaded_ones_in_onnxruntime(quick: None, tmp_path: Path, inputs: Any) -> None:
    graph = network()
    loaded = regauge.load(graph.to_onnx(tmp_path / "model.onnx"))
    for one, runtime in ((graph, "torch"), (loaded, "onnxruntime")):
        small = regauge.optimize(one, "prune{ratio=0.5}")
        timings = latency.measure([one, small], inputs)
        assert [timing.runtime for timing in timings] == [runtime, runtime]
        assert all(timing.milliseconds > 0 for timing in timings)


def test_a_graph_quantized_for_onnxruntime_is_measured_there(quick: None) -> None:
    graph = network()
    small = regauge.optimize(graph, "quantize", data=[torch.randn(16, 8)])
    assert [timing.runtime for timing in latency.measure([graph, small])] == ["onnxruntime"] * 2


class Named(nn.Module):
    def forward(self, pair: dict[str, torch.Tensor], *, scale: torch.Tensor) -> torch.Tensor:
        return (pair["a"] + pair["b"]) * scale


def test_inputs_come_flat_whatever_the_module_took(quick: None) -> None:
    a, b, scale = torch.randn(2, 3), torch.randn(2, 3), torch.randn(3)
    graph = regauge.capture(Named(), ({"a": a, "b": b},), {"scale": scale})
    (timing,) = latency.measure([graph], [a, b, scale])
    assert timing.milliseconds > 0


def test_a_graph_that_no_made_up_inputs_fit_asks_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "sample_runs", lambda graph: iter(()))
    with pytest.raises(RegaugeError, match="its latency cannot be measured: give data="):
        latency.measure([network()])


def test_noise_is_the_standard_error_of_the_median() -> None:
    draws = np.random.default_rng(0).normal(10, 1, (400, 101))
    told = np.mean([latency._noise(list(row)) for row in draws])
    assert told == pytest.approx(np.median(draws, 1).std() / 10, rel=0.1)


def test_all_run_in_turns_until_medians_are_known() -> None:
    clock = iter(range(10_000))
    order: list[str] = []
    times = latency._rounds([lambda: order.append("a"), lambda: order.append("b")], lambda: next(clock) / 1e3)
    assert order == ["a", "b"] * (latency._WARMUP + latency.FEWEST)
    assert times == [[pytest.approx(1.0)] * latency.FEWEST] * 2


def test_optimize_hands_measuring_to_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def fake(graphs: Sequence[Graph], inputs: Any) -> list[Timing]:
        seen.append(len(graphs))
        sizes = [sum(p.tensor.numel() for p in graph.all_parameters()) for graph in graphs]
        return [Timing(size / 1e3, 0.0, "a fake") for size in sizes]

    monkeypatch.setattr(latency, "measure", fake)
    small = regauge.optimize(network(), "prune{latency=0.5}")
    assert seen[0] == 4 and "measured in a fake" in str(small.report)
