"""``equalize``: the same function, the same range on both sides of a channel, and less error in eight bits."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import regauge
from random_networks import networks
from regauge.ir.gauge.classes import Gauge
from regauge.ir.gauge.frames import find_frames
from regauge.ir.gauge.insertion import scaled
from regauge.ir.graph import Graph
from regauge.ir.storage.weights import dense
from regauge.passes.quantization.equalization import balances, equalizing
from regauge.passes.quantization.frame_weights import greatest
from regauge.passes.quantization.grid import Grid


class Inverted(nn.Module):
    """A stem, a block as MobileNets have it with a shortcut around it, and a head; ``act`` behind each layer."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), act())
        self.block = nn.Sequential(
            nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), act(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), act(),
            nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


def inverted(act: type[nn.Module] = nn.ReLU) -> tuple[Graph, torch.Tensor]:
    """The same function in other scales: channels are up to a hundred times as large as others."""
    torch.manual_seed(0)
    model, x = Inverted(act), torch.randn(16, 3, 10, 10)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.bias.normal_()
        for _ in range(20):
            model(torch.randn(16, 3, 10, 10))
    graph = regauge.optimize(regauge.capture(model.eval(), (x,)), "simplify")
    frames = [frame for frame in find_frames(graph) if Gauge.SCALE in frame.gauge]
    return scaled(graph, {frame: 10 ** (2 * torch.rand(frame.shape)) for frame in frames}), x


def decibels(graph: Graph, other: Graph, x: torch.Tensor) -> float:
    (a,), (b,) = graph.run((x,)), other.run((x,))
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum().clamp(min=1e-30)))


def rounded_weights(graph: Graph, bits: int = 8) -> Graph:
    """Every weight with one scale for all of it."""
    result, grid = graph.copy(), Grid(bits)
    for parameter in result.parameters.values():
        if parameter.rank > 1:
            tensor = parameter.tensor.detach()
            scale, zero = grid.span(tensor.min(), tensor.max())
            parameter.weight = dense(grid.codes(tensor, scale, zero) * scale)
    return result


def test_one_scale_for_a_weight_is_enough_then() -> None:
    """8 dB before, 34 dB after."""
    graph, x = inverted()
    even = regauge.optimize(graph, "equalize")
    assert decibels(graph, even, x) > 90
    before, after = (decibels(graph, rounded_weights(g), x) for g in (graph, even))
    assert before < 10 and after > 30


def test_a_depthwise_layer_and_its_neighbours_have_the_cube_root_of_their_product() -> None:
    """Dims of the block: the three greatest magnitudes of each channel."""
    graph, _ = inverted()
    plain, even = (regauge.optimize(graph, name) for name in ("simplify", "equalize"))

    def ranges(found: Graph) -> torch.Tensor:
        expand, depthwise, project = (found.parameters[f"block.{n}.weight"].tensor for n in (0, 3, 6))
        return torch.stack([expand.abs().amax((1, 2, 3)), depthwise.abs().amax((1, 2, 3)),
                            project.abs().amax((0, 2, 3))])  # fmt: skip

    middle = ranges(even)
    torch.testing.assert_close(middle, middle.mean(0).expand(3, -1), rtol=5e-3, atol=0)
    assert float(ranges(plain).std(0).mean()) > 10 * float(middle.std(0).mean())


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(networks())
def test_both_sides_of_every_frame_are_alike(graph: Graph) -> None:
    between = balances(graph, find_frames(graph))
    scales, rounds = equalizing(between)
    assert rounds < 200
    even = scaled(graph, scales)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for a, b in zip(graph.run((x,)), even.run((x,)), strict=True):
        assert float((a - b).abs().max()) <= 1e-9 * float(a.abs().max())
    for frame, writers, readers in between:
        count = int(torch.Size(frame.shape).numel())
        written, read = (
            torch.stack([greatest(even.parameters[p.name].tensor, index, count) for p, index in side]).amax(0)
            for side in (writers, readers)
        )
        both = (written > 0) & (read > 0)
        torch.testing.assert_close(written[both], read[both], rtol=5e-3, atol=0)


@pytest.mark.parametrize(("clips", "least"), [("bound", 90.0), ("relu", 10.0), ("keep", 90.0)])
def test_clips_from_zero_to_six(clips: str, least: float) -> None:
    """With a bound for each channel the function stays; only a plain ReLU or bounds let scales through."""
    graph, x = inverted(nn.ReLU6)
    even = regauge.optimize(graph, f"equalize{{clips={clips}}}")
    ops = [node.op for node in even.nodes]
    assert decibels(graph, even, 3 * x) > least
    assert (ops.count("minimum"), ops.count("hardtanh")) == {"bound": (3, 0), "relu": (0, 0), "keep": (0, 3)}[clips]
    assert even.report.passes[0].contract == ("approximate" if clips == "relu" else "exact")


@pytest.mark.parametrize("with_data", [False, True])
def test_high_shifts_are_absorbed(with_data: bool) -> None:
    """The channel that is always on loses its shift, and the function hardly changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 2))
    x = torch.randn(64, 3, 6, 6)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([8.0, 0.0, 5.0, -1.0, 0.5, 3.5]))
        for _ in range(60):
            model(torch.randn(64, 3, 6, 6))
    graph = regauge.capture(model.eval(), (x,))
    data = [x] if with_data else None
    even = regauge.optimize(graph, "equalize{absorb=true}", data=data)
    assert "1 values without a high shift" in even.report.passes[0].notes
    assert 40 < decibels(graph, even, x) < 90

    def reach(found: Graph) -> float:
        seen: list[torch.Tensor] = []
        found.run((x,), hook=lambda node, results: seen.append(results[0]) if node.op == "relu" else None)  # type: ignore[func-returns-value]
        per_channel = seen[0].amax((0, 2, 3))
        return float(per_channel.max() / per_channel.median())

    assert reach(even) < reach(regauge.optimize(graph, "equalize")) * 0.9
