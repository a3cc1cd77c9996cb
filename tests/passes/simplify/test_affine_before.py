"""Scales and shifts before linear maps: what they are folded into, and where they stay."""

from collections import Counter

import pytest
import torch
from torch import nn

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.passes.simplify.catalog import RULE_SETS
from simplified import refusals, simplified

RULES = RULE_SETS["affine"]


class Leading(nn.Module):
    """Batch norms before a padded, an unpadded and two sibling convolutions, and before a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 4, 1, bias=False)
        self.right = nn.Conv2d(6, 4, 2, stride=2)
        self.padded_norm = nn.BatchNorm2d(4)
        self.padded = nn.Conv2d(4, 4, 3, padding=1)
        self.last_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.relu(self.first(self.inputs(x))))
        x = torch.relu(self.left(x)[..., ::2, ::2] + self.right(x))
        x = torch.relu(self.padded(self.padded_norm(x)))
        return self.head(self.last_norm(x).flatten(1))


def test_norms_before_maps_go_into_their_weights() -> None:
    graph = simplified(Leading(), torch.randn(2, 4, 10, 10))
    counts = Counter(node.op for node in graph.nodes)
    assert (counts["batch_norm"], counts["conv"], counts["linear"]) == (1, 4, 1)
    kept = next(node for node in graph.nodes if node.op == "batch_norm")
    assert kept.scope[-1][0] == "padded_norm"  # zeros are put around what it computes
    assert {"left.weight", "left.bias"} <= set(graph.to_torch().state_dict())


class Scaled(nn.Module):
    """A scale, which zero padding lets through, before a padded and a transposed convolution and a matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 6, 2, 2)
        self.matrix = nn.Parameter(torch.rand(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(-x * self.scale))
        x = torch.relu(self.up(x / 4))
        return (0.5 * x.permute(0, 2, 3, 1)) @ self.matrix


def test_scales_pass_zero_padding() -> None:
    for assemble, last in (("never", "matmul"), ("auto", "linear")):
        graph = simplified(Scaled(), torch.randn(2, 4, 6, 6), passes=f"simplify{{assemble={assemble}}}")
        assert [node.op for node in graph.nodes] == ["conv", "relu", "conv_transpose", "relu", "permute", last]


def shared_norm(kind: str) -> Graph:
    """A batch norm that two convolutions read; the second one, or another reader, cannot take it over."""
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 4, 6, 6), torch.float64)
    gain, shift, mean, var = (build.parameter(n, torch.rand(4).double() + 0.5) for n in ("g", "b", "m", "v"))
    y = build.batch_norm(x, gain, shift, mean, var)
    first, second = (build.parameter(n, torch.randn(4, 4, 3, 3).double()) for n in ("first", "second"))
    a = build.conv(y, first)
    b = {
        "both": lambda: build.conv(y, second),
        "padded": lambda: build.conv(y, second, padding=1),
        "same weight": lambda: build.conv(y, first, stride=2),
        "other reader": lambda: build.relu(y),
        "output": lambda: y,
        "as a weight": lambda: build.conv(x, y),
    }[kind]()
    graph.outputs = [a, b]
    return graph


def test_a_norm_that_two_maps_read_goes_into_both_or_neither() -> None:
    from regauge import optimize
    from regauge.ir.running.interpret import run

    graph, x = shared_norm("both"), torch.randn(2, 4, 6, 6).double()
    after = optimize(graph, "simplify")
    assert [node.op for node in after.nodes] == ["conv", "conv"]
    assert set(after.parameters) == {"first", "first.bias", "second", "second.bias"}
    torch.testing.assert_close(run(after, [x]), run(graph, [x]))
    reasons = {
        "padded": "zero padding",
        "same weight": "has other readers",
        "other reader": "relu = relu reads it too",
        "output": "is an output too",
        "as a weight": "reads it too, and cannot take it over",
    }
    for kind, reason in reasons.items():
        assert reason in refusals(shared_norm(kind), RULES), kind


def test_what_does_not_run_along_the_input_channels_stays() -> None:
    for shape in ((6,), (6, 1), (2, 1, 1, 1)):
        graph = Graph()
        build = Builder(graph)
        x = build.input("x", (2, 4, 6, 6), torch.float64)
        y = build.mul(x, build.parameter("s", torch.rand(shape).double()))
        graph.outputs = [build.conv(y, build.parameter("w", torch.randn(4, 4, 3, 3).double()))]
        assert "does not run along the input channels alone" in refusals(graph, RULES)


def test_a_shift_stays_before_a_transposed_convolution() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 4, 6, 6), torch.float64)
    graph.outputs = [build.conv_transpose(build.add(x, 1.0), build.parameter("w", torch.randn(4, 4, 3, 3).double()))]
    assert "a shift is not moved through a conv_transpose" in refusals(graph, RULES)


def test_integers_stay() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 4), torch.int64)
    graph.outputs = [build.linear(build.mul(x, 3), build.parameter("w", torch.ones(4, 4, dtype=torch.int64)))]
    assert "of another type" in refusals(graph, RULES)


def primitive_norm(root: str) -> Graph:
    """``x / sqrt(mean(x * x) + eps) * gain + shift`` as exporters spell it, before a linear map."""
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 5, 4), torch.float64)
    square = build.add(build.mean(build.mul(x, x), dims=(-1,), keepdim=True), 1e-6)
    inverse = build.rsqrt(square) if root == "rsqrt" else build.div(1.0, build.sqrt(square))
    y = build.div(x, build.sqrt(square)) if root == "sqrt" else build.mul(x, inverse)
    gain, shift = (build.parameter(name, torch.rand(4).double()) for name in ("gain", "shift"))
    y = build.add(build.mul(gain, y), shift)
    graph.outputs = [build.linear(y, build.parameter("w", torch.randn(3, 4).double()))]
    return graph


@pytest.mark.parametrize("root", ["sqrt", "rsqrt", "inverse"])
def test_the_gain_and_the_shift_of_a_norm_in_primitive_operators_stay(root: str) -> None:
    """Runtimes know a norm by them: without, they run its operators one by one."""
    assert "which runtimes know by them" in refusals(primitive_norm(root), RULES)
