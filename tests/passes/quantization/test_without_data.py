"""Weights rounded without data: biases corrected by batch norms, and what is lost taken over by the layers behind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import regauge
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.calibration.expected_inputs import ExpectedInputs
from regauge.passes.calibration.layers import layer_of
from regauge.passes.quantization.grid import Form, Grid
from regauge.passes.quantization.without_data import stored_without_data


class Normed(nn.Module):
    """Convolutions with batch norms: a shortcut padded with zero channels, a depthwise one, a flattened end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 16, 1)
        self.depth, self.head = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Linear(16 * 9, 10)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (12, 12, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.norms[0](self.stem(x)).relu()
        b = self.norms[2](self.two(self.norms[1](self.one(a)).relu()))
        a = (nn.functional.pad(a, (0, 0, 0, 0, 2, 2)) + b).relu()
        return self.head(nn.functional.avg_pool2d(self.norms[3](self.depth(a)).relu(), 2).flatten(1))


def normed() -> tuple[nn.Module, Graph, torch.Tensor]:
    """With statistics of normal images, and images of the same kind."""
    torch.manual_seed(0)
    model = Normed()
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 1)
            norm.momentum = None
        model.train()
        for _ in range(4):
            model(torch.randn(256, 3, 8, 8))
    x = torch.randn(512, 3, 8, 8)
    return model.eval(), regauge.capture(model, (x[:2],), dynamic={0: {0: "batch"}}), x


def error(graph: Graph, small: Graph, x: torch.Tensor) -> float:
    y = graph.run((x,))[0].double()
    return float((small.run((x,))[0].double() - y).square().mean() / y.var())


def test_expected_inputs_are_those_of_the_images_that_batch_norms_saw() -> None:
    """Within a tenth of them, behind a padded shortcut and with zeros around images; those of the first are unknown.

    Batch norms know channels and no places, which the flattened end reads apart.
    """
    _, graph, x = normed()
    expected, run = ExpectedInputs(graph), Lockstep(graph, [(x,)])
    for node in run.steps():
        layer = layer_of(node, blocks=True)
        if layer is None:
            continue
        found = expected.of(layer)
        if layer.weight.name == "stem.weight":
            assert found == "what it reads is an input, or came about when norms were folded"
            continue
        assert isinstance(found, torch.Tensor)
        mean = torch.stack([rows.mean(0) for rows in layer.blocks_of_input(run.values(node.inputs[0])[0])]).double()
        if layer.node.op == "linear":
            found, mean = (part.reshape(16, 9).mean(1) for part in (found, mean))
        assert float((found - mean).norm() / mean.norm()) < 0.1


def test_the_mean_of_a_rectified_normal_is_that_of_the_paper() -> None:
    """s phi(m / s) + m Phi(m / s), of each channel by its own gain and shift."""
    model = nn.Sequential(nn.Conv2d(1, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.2, -0.7, 1.0, 2.0, 3.0]))
        model[1].bias.copy_(torch.tensor([1.0, -1.0, 0.0, 0.5, -2.0]))
    graph = regauge.capture(model.eval(), (torch.randn(2, 1, 4, 4),))
    layer = layer_of(graph.nodes[-1])
    assert layer is not None
    found = ExpectedInputs(graph).of(layer)
    m, s = model[1].bias.detach().double(), model[1].weight.detach().double().abs()
    normal = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    wanted = s * normal.log_prob(m / s).exp() + m * normal.cdf(m / s)
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found[0], wanted, rtol=1e-3, atol=1e-4)


class Framed(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.norm, self.next, self.way = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x).relu()
        if self.way == "zeros on one side":
            return self.next(nn.functional.pad(x, (0, 3, 0, 4)))
        return self.next(nn.functional.avg_pool2d(x, 2, divisor_override=1))


def test_zeros_put_around_count_and_sums_of_windows_are_no_means() -> None:
    torch.manual_seed(0)
    model, x = Framed("zeros on one side").eval(), torch.randn(256, 4, 8, 8)
    graph = regauge.capture(model, (x,))
    layer = layer_of(graph.nodes[-1])
    assert layer is not None
    found = ExpectedInputs(graph).of(layer)
    with torch.no_grad():
        read = nn.functional.pad(model.norm(x).relu(), (0, 3, 0, 4))
    mean = read.double().mean((0, 2, 3)).repeat_interleave(9)
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found[0], mean, rtol=0.05, atol=0.01)
    graph = regauge.capture(Framed("sums").eval(), (x,))
    layer = layer_of(graph.nodes[-1])
    assert layer is not None and ExpectedInputs(graph).of(layer) == "avg_pool stands between"


@pytest.mark.parametrize(("scheme", "gain"), [("w8", 1.2), ("w4", 1.2), ("w3", 1.2)])
def test_biases_make_up_for_the_mean_without_data(scheme: str, gain: float) -> None:
    """By default, where batch norms tell; method=nearest leaves biases alone, unless it is asked for."""
    _, graph, x = normed()
    step = f"scheme={scheme},target=reference"
    nearest = regauge.optimize(graph, f"quantize{{{step},method=nearest}}")
    found = regauge.optimize(graph, f"quantize{{{step}}}")
    assert gain * error(graph, found, x) < error(graph, nearest, x)
    assert "4 of 5 biases corrected by what batch norms hold" in found.report.passes[0].notes
    asked = regauge.optimize(graph, f"quantize{{{step},method=nearest,correct=true}}")
    assert math.isclose(error(graph, asked, x), error(graph, found, x), rel_tol=1e-4)
    kept = regauge.optimize(graph, f"quantize{{{step},correct=false}}")
    assert math.isclose(error(graph, kept, x), error(graph, nearest, x), rel_tol=1e-4)


def test_biases_make_up_for_the_mean_on_data() -> None:
    """Rounded to the nearest with biases by data is better than by batch norms, and worse than codes by data."""
    _, graph, x = normed()
    ways = ("method=nearest", "method=nearest,correct=true", "correct=false", "method=descent")
    step = "scheme=w4,target=reference"
    found = [
        error(graph, regauge.optimize(graph, f"quantize{{{step},{way}}}", data=list(x[:256].split(64))), x[256:])
        for way in ways
    ]
    without = error(graph, regauge.optimize(graph, f"quantize{{{step}}}"), x[256:])
    assert found[0] > without > found[1] > found[3] and found[0] > found[2] > found[3]


class Rotated(nn.Module):
    """Two linear layers with nothing between; both results are read, so that they stay two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.first(x)
        return self.second(y), y


def test_layers_take_over_what_channels_lost() -> None:
    """All rows are combinations of as many rounded ones: what reads them takes much of what they lost over."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    graph = regauge.capture(Rotated().eval(), (x,))
    found = []
    for udfc in (False, True):
        small = graph.copy()
        layers = [layer for node in small.nodes if (layer := layer_of(node)) is not None]
        formats = {"first.weight": Form(Grid(3), 16), "second.weight": Form(Grid(8), 16)}
        stored_without_data(small, layers, formats, None, udfc=udfc, by="test")
        found.append(error(graph, small, x))
    assert found[1] < 0.6 * found[0]


def test_udfc_keeps_zeros_and_leaves_blocks_alone() -> None:
    _, graph, x = normed()
    sparse = regauge.optimize(graph, "sparsify{pattern=2:4}")
    small = regauge.optimize(sparse, "quantize{scheme=w4,target=reference,method=udfc}")
    again = regauge.optimize(small, "dequantize")
    zeros = {p.name: float((p.tensor == 0).float().mean()) for p in again.all_parameters() if p.rank > 1}
    assert all(share >= 0.5 for name, share in zeros.items() if name.startswith(("one", "two")))
    assert error(sparse, small, x) < 0.1


def test_options_that_do_not_go_together() -> None:
    _, graph, _ = normed()
    for options, reason in (
        ("method=adaround,correct=true", "biases are learned with method=adaround"),
        ("scheme=codebook,target=reference,group=2,permute=true,correct=true", "leave permute=true out"),
        ("scheme=bitstack,target=reference,correct=true", "correct does nothing with scheme=bitstack"),
    ):
        with pytest.raises(PassError, match=reason):
            regauge.optimize(graph, f"quantize{{{options}}}")
