"""The gate of ``quantize`` on times that are given, not measured."""

import platform
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import regauge
from regauge.ir.errors import PassError, RegaugeWarning
from regauge.ir.graph import Graph
from regauge.ir.timing import Timing
from regauge.passes.base import Context
from regauge.passes.quantization.quantize import Quantize


def quantized(
    gate: str, after: float, noise: float = 0.01, target: str = "ort-x86"
) -> tuple[Graph, Context, list[Any]]:
    """With a runtime in which a run took a millisecond, and takes ``after`` of them."""
    seen: list[Any] = []

    def measure(graphs: Sequence[Graph], inputs: Any) -> list[Timing]:
        seen.extend([len(graphs), inputs])
        return [Timing(1.0, noise, "a runtime"), Timing(after, noise, "a runtime")]

    model, batches = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), [torch.randn(16, 8)]
    graph = regauge.capture(model, (batches[0],))
    context = Context(data=batches, measure=measure)
    return Quantize(gate=gate, target=target).call(graph, context), context, seen  # type: ignore[arg-type]


@pytest.fixture
def on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def test_slower_than_in_float_is_told(on_x86: None) -> None:
    with pytest.warns(RegaugeWarning, match="1.5 ms for 1 ms in a runtime, one thread: slower than in float"):
        _, context, seen = quantized("warn", 1.5)
    assert "1.5 ms for 1 ms in a runtime, one thread" in context.notes
    assert seen[0] == 2 and seen[1][0].shape == (16, 8)
    with pytest.raises(PassError, match="slower than in float; leave layers out"):
        quantized("error", 1.5)


def test_faster_or_within_the_noise_passes(on_x86: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegaugeWarning)
        _, context, _ = quantized("error", 0.5)
        quantized("error", 1.03)
    assert "0.5 ms for 1 ms in a runtime, one thread" in context.notes


def test_nothing_is_measured_unless_asked_or_elsewhere(on_x86: None) -> None:
    assert quantized("off", 9.0)[2] == []
    _, context, seen = quantized("error", 9.0, target="ort-arm")
    assert seen == [] and "times were not measured: ort-arm does not run on this machine" in context.notes


def test_a_target_that_nothing_here_runs_is_refused() -> None:
    with pytest.raises(PassError, match="tensorrt cannot be run here"):
        Quantize(gate="warn", target="tensorrt")
