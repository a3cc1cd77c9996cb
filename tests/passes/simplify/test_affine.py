"""Scales and shifts behind linear maps: what they are folded into, and where they stay."""

from collections import Counter

import pytest
import torch
from torch import nn

import regauge
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, State
from regauge.ir.running.interpret import run
from regauge.passes.simplify.catalog import RULE_SETS
from simplified import refusals, simplified

RULES = RULE_SETS["affine"]


class Scaled(nn.Module):
    """A convolution with a learnt scale per channel, in all the ways that a network writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.gain = nn.Parameter(torch.rand(8))
        self.up = nn.ConvTranspose2d(8, 6, 2, 2, groups=2)
        self.up_norm = nn.BatchNorm2d(6, affine=False)
        self.head = nn.Linear(6, 4)
        self.layer_scale = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)) * self.gain.view(1, -1, 1, 1) / 3 + 1.5)
        x = torch.relu(1 - self.up_norm(self.up(x)))
        return -(self.layer_scale * self.head(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def test_scales_of_a_network_go_into_its_weights() -> None:
    graph = simplified(Scaled(), torch.randn(2, 3, 8, 8))
    assert Counter(node.op for node in graph.nodes) == {
        "conv": 1, "relu": 2, "conv_transpose": 1, "permute": 2, "linear": 1
    }  # fmt: skip
    assert set(graph.to_torch().state_dict()) == {
        "conv.weight", "conv.bias", "up.weight", "up.bias", "head.weight", "head.bias"
    }  # fmt: skip


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(torch.relu(self.conv(x))))


def test_a_weight_that_two_convolutions_read_is_not_folded_into() -> None:
    graph = simplified(Shared(), torch.randn(1, 3, 4, 4))
    assert [node.op for node in graph.nodes] == ["conv", "relu", "conv", "batch_norm"]


def one_step(op: str, shape: tuple[int, ...], other: object, *, layout: bool = False) -> Graph:
    """``op(conv(x), other)`` with a result of 4 channels and 5 x 5 places."""
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3, 5, 5), torch.float64)
    y = build.conv(x, build.parameter("w", torch.randn(4, 3, 3, 3).double()), padding=1)
    if layout:
        y = build.reshape(y, shape=(2, 100))
    if isinstance(other, torch.Tensor):
        other = build.parameter("other", other)
    elif other == "input":
        other = build.input("other", shape, torch.float64)
    graph.outputs = [build(op, y, other)]
    return graph


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (one_step("mul", (), torch.rand(5).double()), "does not run along the output channels alone"),
        (one_step("mul", (), torch.rand(2, 4, 1, 1).double()), "does not run along the output channels alone"),
        (one_step("mul", (), torch.rand(2, 2, 4, 1, 1).double()), "mul changes the type or the shape"),
        (one_step("add", (4, 1, 1), "input"), "is computed from inputs"),
        (one_step("mul", (4, 1, 1), "input"), "is computed from inputs"),
        (one_step("add", (), torch.rand(100).double(), layout=True), "does not run along the output channels alone"),
        (one_step("div", (), torch.tensor([0.0, 1, 1, 1]).double().reshape(4, 1, 1)), "would not be finite"),
    ],
)
def test_what_is_no_scale_of_output_channels_stays(graph: Graph, reason: str) -> None:
    assert reason in refusals(graph, RULES)


def test_types_that_do_not_fit_stay() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float32)
    y = build.linear(x, build.parameter("w", torch.randn(4, 3)))
    graph.outputs = [build.mul(y, build.parameter("s", torch.rand(4).double()))]
    assert "mul changes the type" in refusals(graph, RULES)


def test_an_overflow_in_half_precision_stays() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float16)
    y = build.linear(x, build.parameter("w", torch.full((4, 3), 100.0).half()))
    graph.outputs = [build.mul(y, 1000.0)]
    assert "would not be finite" in refusals(graph, RULES)


def test_statistics_that_are_written_stay() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float64)
    y = build.linear(x, build.parameter("w", torch.randn(4, 3).double()))
    mean, var = (build.parameter(n, torch.rand(4).double(), "buffer") for n in ("mean", "var"))
    after = build.add(mean, 1.0)
    graph.outputs = [build.batch_norm(y, None, None, mean, var)]
    graph.states = [State("mean", mean, after)]
    assert "written from run to run" in refusals(graph, RULES)


def test_a_norm_of_the_batch_stays() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float64)
    y = build.linear(x, build.parameter("w", torch.randn(4, 3).double()))
    graph.outputs = [build.batch_norm(y, training=True)]
    refusals(graph, RULES)


def test_the_bias_of_a_shared_weight_takes_a_shift() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float64)
    w = build.parameter("layer.weight", torch.randn(3, 3).double())
    graph.outputs = [build.linear(build.add(build.linear(x, w), 2.0), w)]
    expected = run(graph, [torch.ones(2, 3).double()])
    after = regauge.optimize(graph, "simplify{only=scale-or-shift-into-weights}")
    assert len(after) == 2 and list(after.parameters) == ["layer.weight", "layer.bias"]
    torch.testing.assert_close(run(after, [torch.ones(2, 3).double()]), expected)


def test_a_scale_behind_a_biased_matmul_goes_into_both() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float64)
    w, t, f = (build.parameter(n, torch.randn(s).double()) for n, s in (("w", (3, 4)), ("t", (4,)), ("f", (4,))))
    graph.outputs = [build.div(build.sub(build.matmul(x, w), t), f)]
    for assemble, ops in (("never", ["matmul", "add"]), ("always", ["linear"])):
        after = regauge.optimize(graph, f"simplify{{assemble={assemble}}}")
        assert [node.op for node in after.nodes] == ops and len(after.parameters) == 2
        torch.testing.assert_close(run(after, [torch.ones(2, 3).double()]), run(graph, [torch.ones(2, 3).double()]))


def test_a_scale_behind_a_sum_of_a_matmul_and_an_input_stays() -> None:
    graph = Graph()
    build = Builder(graph)
    x, y = build.input("x", (2, 3), torch.float64), build.input("y", (4,), torch.float64)
    graph.outputs = [build.mul(build.add(build.matmul(x, build.parameter("w", torch.ones(3, 4).double())), y), 2.0)]
    assert "is computed from inputs" in refusals(graph, RULES)
