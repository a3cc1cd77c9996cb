"""Maps inserted in frames leave the function as it is: random networks, heads, groups, gates, tied weights, ONNX."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import regauge
from headed_networks import Attention, FusedHeads, Groups
from random_networks import networks
from regauge.ir.edit import Builder
from regauge.ir.errors import GraphError
from regauge.ir.gauge.classes import Gauge
from regauge.ir.gauge.frames import Frame, find_frames, frames_of
from regauge.ir.gauge.insertion import rotated, scaled
from regauge.ir.graph import Graph
from regauge.ir.verify import verify


def all_scaled(graph: Graph, seed: int = 0) -> tuple[Graph, list[Frame]]:
    """Every frame that admits it with scales of its own, up to a factor of eight apart."""
    generator = torch.Generator().manual_seed(seed)
    frames = [frame for frame in find_frames(graph) if Gauge.SCALE in frame.gauge]
    scales = {f: 2 ** (3 * torch.rand(f.shape, generator=generator).double() - 1.5) for f in frames}
    return scaled(graph, scales), frames


def all_rotated(graph: Graph, seed: int = 0) -> tuple[Graph, list[Frame]]:
    """Every frame that admits it with a matrix per index of its majors: any invertible one, or an orthogonal one."""
    generator = torch.Generator().manual_seed(seed)
    frames = [frame for frame in find_frames(graph) if Gauge.ORTHOGONAL in frame.gauge]
    matrices = {}
    for frame in frames:
        size = int(frame.dim.size)
        noise = torch.randn(*frame.shape, size, generator=generator, dtype=torch.float64)
        general = Gauge.GENERAL in frame.gauge
        matrices[frame] = noise / size + torch.eye(size).double() if general else torch.linalg.qr(noise)[0]
    return rotated(graph, matrices), frames


def difference(a: Graph, b: Graph, inputs: Any) -> float:
    """The greatest one of an output, relative to its greatest entry."""
    return max(
        float((x - y).abs().max() / x.abs().max().clamp(min=1e-30))
        for x, y in zip(a.run(inputs), b.run(inputs), strict=True)
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(networks())
def test_random_networks_stay_the_same(graph: Graph) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for change in (all_scaled, all_rotated):
        found, _ = change(graph)
        verify(found)
        assert difference(graph, found, (x,)) < 1e-9


class Depthwise(nn.Module):
    """Layers around a depthwise one, batch norms, and two branches that are laid end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.left, self.right, self.last = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 3, 1), nn.Conv2d(7, 5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.norm(self.first(x)).relu()).relu()
        x = torch.cat([self.left(x).relu(), self.right(x)], 1)
        return self.head(self.last(x).relu().mean((2, 3)))


class Gated(nn.Module):
    """A residual stream with norms and a gated hidden layer, whose last map is the first one turned around."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 8), nn.RMSNorm(8)
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((8, 12), (8, 12), (12, 8)))
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        y = self.norm(x)
        return self.head(self.last(x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))))


def captured(model: nn.Module, x: torch.Tensor) -> Graph:
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + ("norm" in name))
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.randn_like(buffer)) if name.endswith("running_mean") else None
    return regauge.capture(model.double().eval(), (x,))


HEADS, IMAGES = torch.randn(2, 5, 12).double(), torch.randn(2, 3, 4, 4).double()
MODELS: dict[str, tuple[Any, torch.Tensor, int, int]] = {  # frames with scales, frames with rotations
    "heads": (Attention, HEADS, 4, 2),
    "rotary": (lambda: Attention("rotary"), HEADS, 4, 1),
    "gain on queries": (lambda: Attention("gain"), HEADS, 5, 1),
    "fused heads": (FusedHeads, HEADS, 2, 2),
    "groups": (Groups, torch.randn(2, 5, 9).double(), 4, 0),
    "depthwise": (Depthwise, IMAGES, 6, 1),
    "gated and tied": (Gated, torch.randint(0, 11, (2, 5)), 2, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_captured_modules_stay_the_same(name: str) -> None:
    model, x, scales, rotations = MODELS[name]
    torch.manual_seed(0)
    graph = captured(model(), x)
    weights = {n: p.tensor.clone() for n, p in graph.parameters.items()}
    for change, count in ((all_scaled, scales), (all_rotated, rotations)):
        found, frames = change(graph)
        verify(found)
        assert len(frames) == count and difference(graph, found, (x,)) < 1e-10
        changed = {n for n, p in found.parameters.items() if not torch.equal(p.tensor, weights[n])}
        sides = {side.parameter.name for frame in frames for side in (*frame.writers, *frame.readers)}
        assert changed == sides
    assert all(torch.equal(p.tensor, weights[n]) for n, p in graph.parameters.items())


def test_an_onnx_file_stays_the_same(tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = IMAGES.float()
    graph = regauge.capture(Depthwise().eval(), (x,))
    loaded = regauge.load(graph.to_onnx(tmp_path / "a.onnx"))
    found, frames = all_scaled(loaded)
    assert len(frames) >= 5 and difference(loaded, found, (x,)) < 1e-5
    again = regauge.load(found.to_onnx(tmp_path / "b.onnx"))
    assert difference(graph, again, (x,)) < 1e-5


def test_single_precision_stays_the_same_to_a_part_in_a_hundred_thousand() -> None:
    torch.manual_seed(0)
    graph = regauge.capture(Attention().eval(), (HEADS.float(),))
    for change in (all_scaled, all_rotated):
        assert difference(graph, change(graph)[0], (HEADS.float(),)) < 1e-5


def test_a_scale_differs_from_head_to_head() -> None:
    graph = captured(Attention(), HEADS)
    (frame,) = frames_of(graph, "v.weight:0.1")
    assert frame.shape == (2, 8) and [s.parameter.name for s in frame.writers] == ["v.weight", "v.bias"]
    scales = torch.ones(2, 8).double()
    scales[1, 3] = 4.0
    found = scaled(graph, {frame: scales})
    rows = (found.parameters["v.weight"].tensor / graph.parameters["v.weight"].tensor)[:, 0]
    assert rows.nonzero().numel() == 16 and rows[11] == 4.0 and rows.sum() == 19.0
    columns = (found.parameters["o.weight"].tensor / graph.parameters["o.weight"].tensor)[0]
    assert (columns == 0.25).nonzero().flatten().tolist() == [19, 27]  # both query heads that read the second head


def test_refusals_say_why() -> None:
    graph = captured(Gated(), torch.randint(0, 11, (2, 5)))
    smooth = regauge.capture(nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), (torch.randn(2, 3),))
    with pytest.raises(GraphError, match="is free along 0.weight:0: gelu = gelu in 1 lets no scale and no rotation"):
        frames_of(smooth, "0.weight:0")
    (frame,) = frames_of(graph, "gate.weight:0")
    with pytest.raises(GraphError, match="takes no rotation: its gauge is permutation, sign, positive scale .*mul"):
        rotated(graph, {frame: torch.eye(12)})
    with pytest.raises(GraphError, match="numbers other than zero"):
        scaled(graph, {frame: torch.zeros(12)})
    rectified = captured(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3).double())
    (relu,) = frames_of(rectified, "0.weight:0")
    with pytest.raises(GraphError, match="positive numbers"):
        scaled(rectified, {relu: -torch.ones(4)})
    with pytest.raises(GraphError, match=r"of the shape \[12\], not \[3\]"):
        scaled(graph, {frame: torch.ones(3)})


def test_a_length_norm_takes_orthogonal_matrices_only() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.linear(build.input("x", (4, 5), torch.float64), build.parameter("w", torch.randn(6, 5).double()))
    y = build.rms_norm(x, normalized_shape=(6,), eps=1e-6)
    graph.outputs = [build.linear(y, build.parameter("v", torch.randn(3, 6).double()))]
    (frame,) = frames_of(graph, "w:0")
    with pytest.raises(GraphError, match="no matrix but orthogonal ones"):
        rotated(graph, {frame: 2 * torch.eye(6)})
    with pytest.raises(GraphError, match="takes no scale"):
        scaled(graph, {frame: torch.ones(6)})


def test_a_gain_times_itself_is_no_gain_that_takes_a_scale() -> None:
    graph = Graph()
    build = Builder(graph)
    gain = build.parameter("gain", torch.rand(6).double() + 0.5)
    x = build.linear(build.input("x", (4, 5), torch.float64), build.parameter("w", torch.randn(6, 5).double()))
    y = build.mul(x, build.mul(gain, gain))
    graph.outputs = [build.linear(y, build.parameter("v", torch.randn(3, 6).double()))]
    (frame,) = find_frames(graph)
    assert [side.parameter.name for side in (*frame.writers, *frame.readers)] == ["w", "v"]
    assert difference(graph, all_scaled(graph)[0], (torch.randn(4, 5).double(),)) < 1e-10
