"""What only training needed is dropped in evaluation, and stays where a graph trains."""

import torch
from torch import nn

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.passes.simplify.catalog import RULE_SETS
from simplified import refusals, simplified

RULES = RULE_SETS["training-leftovers"]


class ProgressiveNorm(nn.Module):
    """A batch norm with a scaled shortcut along the channels of tokens, as SLAB's PRepBN ends up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        return (self.norm(x) + self.alpha * x).transpose(1, 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = ProgressiveNorm(6)
        self.fc1 = nn.Linear(6, 12)
        self.fc2 = nn.Linear(12, 6)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.fc2(self.drop(nn.functional.gelu(self.fc1(self.norm(x))))))


def test_a_faded_norm_ends_in_the_next_linear_layer() -> None:
    graph = simplified(Block(), torch.randn(2, 5, 6))
    ops = [node.op for node in graph.nodes]
    assert [op for op in ops if op != "permute"] == ["linear", "gelu", "linear", "add"]
    kept = set(graph.to_torch().state_dict())
    assert kept == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


class Vanilla(nn.Module):
    """A block of VanillaNet at the end of its training: the activation between its convolutions is a line."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
        self.slope = 1.0
        self.act = nn.Conv2d(8, 8, 7, padding=3, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(nn.functional.leaky_relu(self.conv1(x), self.slope))
        return self.act(torch.relu(x))


def test_a_block_whose_activation_became_a_line_is_one_convolution() -> None:
    graph = simplified(Vanilla(), torch.randn(2, 3, 8, 8))
    assert [node.op for node in graph.nodes] == ["conv", "relu", "conv"]
    assert tuple(graph.nodes[0].inputs[1].shape) == (8, 3, 1, 1)  # type: ignore[union-attr]


def test_a_slope_that_bends_stays() -> None:
    model = Vanilla()
    model.slope = 0.99
    graph = simplified(model, torch.randn(2, 3, 8, 8))
    assert [node.op for node in graph.nodes] == ["conv", "leaky_relu", "conv", "relu", "conv"]


def training(op: str) -> Graph:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 4, 3), torch.float64)
    graph.outputs = [build(op, x, training=True)]
    return graph


def test_what_trains_stays() -> None:
    for op in ("dropout", "feature_dropout", "alpha_dropout"):
        assert refusals(training(op), RULES) == ""
    graph = training("dropout")
    build = Builder(graph)
    mean, var = (build.parameter(n, torch.rand(4).double(), "buffer") for n in ("mean", "var"))
    x = graph.inputs[0]
    norm = build.batch_norm(x, None, None, mean, var, training=True)[0]
    graph.outputs = [build.add(norm, x)]
    assert refusals(graph, RULES) == ""


def test_a_shortcut_of_another_input_stays() -> None:
    graph = Graph()
    build = Builder(graph)
    x, y = (build.input(n, (2, 4), torch.float64) for n in "xy")
    mean, var = (build.parameter(n, torch.rand(4).double(), "buffer") for n in ("mean", "var"))
    graph.outputs = [build.add(build.batch_norm(x, None, None, mean, var), y)]
    assert refusals(graph, RULES) == ""


def test_a_network_of_nothing_but_dropout_keeps_an_output_of_its_own() -> None:
    graph = simplified(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)), torch.randn(2, 3))
    assert [node.op for node in graph.nodes] == ["dropout"]
