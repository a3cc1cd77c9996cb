"""Where integers begin and end: pools, convolutions among floats, scales and shifts, masks."""

from pathlib import Path

import torch
from torch import nn

import regauge
from regauge.backends.onnx_model.audit import kernels_of
from regauge.backends.run_onnxruntime import Session
from regauge.ir.graph import Graph


def decibels(graph: Graph, other: Graph, x: torch.Tensor) -> float:
    (a,), (b,) = graph.run((x,)), other.run((x,))
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))


def quantized(model: nn.Module, batches: list[tuple[torch.Tensor]], options: str = "") -> tuple[Graph, Graph]:
    graph = regauge.capture(model.eval(), batches[0], dynamic={0: {0: "batch"}})
    return graph, regauge.optimize(graph, f"quantize{{{options}}}", data=batches)


def test_a_pool_over_all_places_hands_integers_on(tmp_path: Path) -> None:
    """The sum in front of it and the layer behind it have kernels on integers; nothing in between is in float."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 200)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x).relu()
            return self.head(self.pool((x + self.two(x)).relu()).flatten(1))

    batches = [(torch.randn(8, 3, 12, 12),) for _ in range(4)]
    graph = regauge.capture(Net().eval(), batches[0], dynamic={0: {0: "batch"}})
    graph = regauge.load(graph.to_onnx(tmp_path / "float.onnx"))
    small = regauge.optimize(graph, "quantize", data=batches)
    assert decibels(graph, small, torch.randn(8, 3, 12, 12)) > 30
    assert len([node for node in small.nodes if node.op == "mul"]) == 1  # 200 scales of a bias, from those of x and w
    small.to_onnx(tmp_path / "small.onnx")
    kernels, _ = kernels_of(tmp_path / "small.onnx")
    expected = {"QLinearConv": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1, "QuantizeLinear": 1}
    assert {name: kernels[name] for name in (*expected, "Add", "Mul")} == expected | {"Add": 0, "Mul": 0}


def test_a_small_convolution_whose_result_is_read_in_float_stays_in_float() -> None:
    """Patches of a transformer: its kernel would round what goes into the sums that all blocks add to."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, 32, 2, 2)
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(9))
            self.norm = nn.LayerNorm(32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            for layer in self.layers:
                x = x + layer(self.norm(x)).relu()
            return x

    batches = [(torch.randn(8, 1, 12, 12),) for _ in range(4)]
    graph, small = quantized(Patches(), batches)
    assert "patches.weight" in small.parameters  # 128 entries
    assert dict(small.report.passes[0].left) == {"a small convolution whose result is read in float": 1}
    assert decibels(graph, small, torch.randn(8, 1, 12, 12)) > 40


def test_what_a_mask_pushes_down_takes_no_steps() -> None:
    """A value that only a softmax reads counts as no further than 30 below its greatest entry."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).relu()).softmax(1)

    model = Masked()
    with torch.no_grad():
        model.two.bias[2] = -3e4
    batches = [(torch.randn(8, 4, 6, 6),) for _ in range(4)]
    graph, small = quantized(model, batches)
    assert decibels(graph, small, torch.randn(8, 4, 6, 6)) > 25  # with all of the range it is -5
    (a,) = small.run((batches[0][0],))
    assert float(a[:, 2].max()) < 1e-12


def test_a_depthwise_convolution_between_integers_has_a_scale_for_each_channel(tmp_path: Path) -> None:
    """onnxruntime would give its weights one scale for all, as it stands between integers; channels differ here."""

    class Separable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.depth = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, groups=16)
            self.two = nn.Conv2d(16, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.depth(self.one(x).relu()).relu())

    model = Separable()
    with torch.no_grad():
        gains = torch.logspace(-1.5, 1.5, 16)
        model.one.weight.mul_(gains[:, None, None, None])
        model.one.bias.mul_(gains)
        model.depth.weight.div_(gains[:, None, None, None])
    batches = [(torch.randn(8, 3, 12, 12),) for _ in range(4)]
    graph, small = quantized(model, batches)
    assert small.parameters["depth.weight_scale"].shape == (16,) and not small.report.passes[0].left
    small.to_onnx(tmp_path / "small.onnx")
    assert kernels_of(tmp_path / "small.onnx")[0]["QLinearConv"] == 3
    x = torch.randn(8, 3, 12, 12)
    (wanted,), (found,) = graph.run((x,)), Session(tmp_path / "small.onnx").run((x,))
    assert float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum())) > 32
    plain = regauge.optimize(graph, "quantize{smoothing=0}", data=batches)
    assert decibels(graph, small, x) > decibels(graph, plain, x) + 6


def test_a_stream_that_several_layers_read_is_not_scaled_for_one_of_them() -> None:
    """What suited the last layer ruined the convolutions that read the same channels: resnet18 had 10 dB, now 36."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
            with torch.no_grad():
                self.one.weight.mul_(3)
                self.two.weight.mul_(0.1)
                self.two.bias.zero_()  # type: ignore[union-attr]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.two(self.one(x).relu())).relu()

    torch.manual_seed(0)
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), Block(), Block(), *ends).eval()
    batches = [(torch.randn(8, 3, 12, 12),) for _ in range(4)]
    graph = regauge.capture(model, batches[0])
    small = regauge.optimize(graph, "quantize{method=nearest}", data=batches)
    assert decibels(graph, small, batches[0][0]) > 48
