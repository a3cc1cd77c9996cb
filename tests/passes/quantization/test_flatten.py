"""``flatten``: the same function, on data and beyond, and less error with one scale for all channels."""

from typing import Any

import pytest
import torch
from torch import nn

import regauge
from regauge.ir.graph import Graph
from regauge.passes.quantization.splitting import parts_of, threshold_of
from rounded_networks import in_few_bits, relative


def network() -> tuple[Graph, torch.Tensor]:
    """A value of 32 channels, read by two layers, of which two channels are four and seven times as large."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(32, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = nn.functional.gelu(self.first(x))
            return torch.cat([self.a(h), self.b(h)], -1)

    model = Two()
    with torch.no_grad():
        for channel, times in ((5, 4.0), (20, 7.0)):
            model.first.weight[channel] *= times
            model.a.weight[:, channel] /= times
            model.b.weight[:, channel] /= times
    x = torch.randn(64, 16)
    return regauge.capture(model, (x,)), x


def test_large_channels_become_several() -> None:
    """Nine channels more, and 40 dB in 8 bits instead of 31."""
    graph, x = network()
    found = regauge.optimize(graph, "flatten{most=1.3,exclude=first.weight}", data=[x])
    assert found.report.passes[0].notes == ("1 values cut: 32 channels are 41",)
    assert found.parameters["a.weight"].shape == (8, 41) and found.parameters["b.weight"].shape == (6, 41)
    assert relative(graph, found, (x,)) < 1e-6 and relative(graph, found, (50 * x,)) < 1e-6
    assert in_few_bits(found, (x,), 8) > in_few_bits(graph, (x,), 8) + 7


def test_parts_add_up() -> None:
    reach = torch.tensor([1.0, 4.2, 2.0], dtype=torch.float64)
    parts = parts_of(reach, 2.0)
    assert parts.channel.tolist() == [0, 1, 1, 1, 2]
    assert parts.low.tolist() == [0, 0, 2, 4, 0] and parts.high.isinf().tolist() == [True, False, False, True, True]
    assert threshold_of(reach, 1.4) == pytest.approx(2.1, abs=1e-3)  # 4.2 in two, and nothing else


def test_an_onnx_file_has_them(tmp_path: Any) -> None:
    graph, x = network()
    found = regauge.optimize(graph, "flatten", data=[x])
    again = regauge.load(found.to_onnx(tmp_path / "flat.onnx"))
    assert relative(graph, again, (x,)) < 1e-5


def test_even_channels_stay() -> None:
    torch.manual_seed(0)
    x = torch.rand(64, 16) + 1
    graph = regauge.capture(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)), (x,))
    found = regauge.optimize(graph, "flatten", data=[x])
    assert not found.report.passes[0].notes and len(found) == len(graph)
    assert found.report.passes[0].left == {"no channel of what it reads is far greater than others": 2}
