"""Parallel linear branches: what becomes one map, and what stays."""

from collections import Counter

import pytest
import torch
from torch import nn

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.passes.simplify.catalog import RULE_SETS
from simplified import refusals, simplified

RULES = RULE_SETS["branches"]


def norm_behind(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))


class RepBlock(nn.Module):
    """3x3 + 1x1 + identity, each with a batch norm, as RepVGG is trained."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.wide = norm_behind(nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False))
        self.narrow = norm_behind(nn.Conv2d(width, width, 1, groups=groups, bias=False))
        self.same = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.wide(x) + self.narrow(x) + self.same(x))


class Mobile(nn.Module):
    """Branches that are collected in a loop, as MobileOne is trained: depthwise, then pointwise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        deep = [norm_behind(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)) for _ in range(3)]
        self.deep = nn.ModuleList([*deep, norm_behind(nn.Conv2d(width, width, 1, groups=width)), nn.BatchNorm2d(width)])
        self.wide = nn.ModuleList([norm_behind(nn.Conv2d(width, 2 * width, 1, bias=False)) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for branches in (self.deep, self.wide):
            total: object = 0
            for branch in branches:
                total = total + branch(x)
            x = torch.relu(total)  # type: ignore[arg-type]
        return x


class LargeKernel(nn.Module):
    """A large depthwise kernel beside small and dilated ones, as UniRepLKNet is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        shapes = [(13, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5)]
        self.branches = nn.ModuleList(
            norm_behind(nn.Conv2d(width, width, k, padding=r * (k - 1) // 2, dilation=r, groups=width, bias=False))
            for k, r in shapes
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((branch(x) for branch in self.branches[1:]), self.branches[0](x))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        (nn.Sequential(RepBlock(4), RepBlock(4, groups=2)), [(4, 4, 3, 3), (4, 2, 3, 3)]),
        (Mobile(4), [(4, 1, 3, 3), (8, 4, 1, 1)]),
        (LargeKernel(4), [(4, 1, 13, 13)]),
    ],
)
def test_trained_branches_become_one_convolution(model: nn.Module, weights: list[tuple[int, ...]]) -> None:
    graph = simplified(model, torch.randn(2, 4, 15, 15))
    assert set(Counter(node.op for node in graph.nodes)) <= {"conv", "relu"}
    convs = [node for node in graph.nodes if node.op == "conv"]
    assert [tuple(node.inputs[1].shape) for node in convs] == weights  # type: ignore[union-attr]
    kept = list(graph.to_torch().state_dict())
    assert len(kept) == 2 * len(convs)


class Adapted(nn.Module):
    """A linear layer, a convolution and an embedding with low-rank adapters, in the forms that libraries write."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.table_a = nn.Parameter(torch.randn(2, 9))
        self.table_b = nn.Parameter(torch.randn(6, 2))
        self.base = nn.Linear(6, 8)
        self.down = nn.Linear(6, 2, bias=False)
        self.up = nn.Linear(2, 8, bias=False)
        self.second_a = nn.Parameter(torch.randn(2, 6))
        self.second_b = nn.Parameter(torch.randn(8, 2))
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.conv_down = nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.conv_up = nn.Conv2d(2, 8, 1, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = x + (nn.functional.embedding(ids, self.table_a.T) @ self.table_b.T) * 0.5
        x = torch.relu(x)
        y = self.base(x)
        y = y + self.up(self.down(self.dropout(x))) * 2.0
        y = y + (x @ self.second_a.T @ self.second_b.T) / 4
        z = self.conv(image) + self.conv_up(self.conv_down(image)) * 0.25
        return torch.relu(y).mean() + z


def test_adapters_are_merged_into_what_they_adapt() -> None:
    graph = simplified(Adapted(), torch.randint(0, 9, (2, 5)), torch.randn(2, 3, 6, 6))
    assert Counter(node.op for node in graph.nodes) == {
        "embedding": 1, "relu": 2, "linear": 1, "conv": 1, "mean": 1, "add": 1
    }  # fmt: skip
    assert {name for name in graph.to_torch().state_dict()} == {
        "table.weight", "base.weight", "base.bias", "conv.weight", "conv.bias"
    }  # fmt: skip


def two_branches(*pair: tuple[tuple[int, ...], dict[str, object]], other_input: bool = False) -> Graph:
    """conv(x, w, ...) + conv(x, v, ...)"""
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 4, 9, 9), torch.float64)
    y = build.input("y", (2, 4, 9, 9), torch.float64) if other_input else x
    parts = [
        build.conv(source, build.parameter(name, torch.randn(shape).double()), **attributes)
        for source, name, (shape, attributes) in zip((x, y), "wv", pair, strict=True)
    ]
    graph.outputs = [build.add(*parts)]
    return graph


PLAIN, DEEP = ((4, 4, 3, 3), {"padding": (1, 1)}), ((4, 1, 3, 3), {"padding": (1, 1), "groups": 4})


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (
            two_branches(((4, 4, 1, 1), {"stride": (2, 2)}), ((4, 4, 1, 1), {"stride": (4, 4), "padding": (4, 4)})),
            "their strides are (2, 2) and (4, 4)",
        ),
        (two_branches(((4, 4, 1, 1), {}), ((4, 4, 9, 9), {})), "the branches have different shapes"),
        (
            two_branches(((4, 4, 3, 3), {"padding": (4, 4), "dilation": (4, 4)}), PLAIN),
            "merged they would have 1296 parameters and 209952 MACs, not 288 and 46656",
        ),
        (
            two_branches(((4, 4, 1, 1), {}), DEEP),
            "merged they would have 144 parameters and 23328 MACs, not 52 and 8424",
        ),
    ],
)
def test_branches_that_stay(graph: Graph, reason: str) -> None:
    assert reason in refusals(graph, RULES)


def test_branches_of_two_inputs_stay() -> None:
    assert refusals(two_branches(PLAIN, PLAIN, other_input=True), RULES) == ""


def test_a_shared_weight_stays() -> None:
    graph = two_branches(PLAIN, PLAIN)
    build = Builder(graph)
    graph.outputs.append(build.conv(graph.inputs[0], graph.parameters["w"], stride=(2, 2)))
    assert "w has other readers" in refusals(graph, RULES)


def test_a_branch_that_is_read_elsewhere_stays() -> None:
    graph = two_branches(PLAIN, PLAIN)
    graph.outputs.append(graph.nodes[0].output)
    refusals(graph, RULES)


def test_a_residual_around_a_nonlinear_block_stays() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 4), torch.float64)
    w, v = (build.parameter(n, torch.randn(4, 4).double()) for n in "wv")
    graph.outputs = [build.add(x, build.linear(build.relu(build.linear(x, w)), v))]
    refusals(graph, RULES)


class Walking(nn.Module):
    """Branches that skip places, a trained block and large kernels, for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = norm_behind(nn.Conv2d(4, 4, 3, padding=1, stride=2))
        self.narrow = norm_behind(nn.Conv2d(4, 4, 1, stride=2))
        self.rest = nn.Sequential(RepBlock(4), LargeKernel(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(torch.relu(self.wide(x) + self.narrow(x)))


def test_sizes_may_be_dynamic() -> None:
    model = Walking()
    graph = simplified(model, torch.randn(2, 4, 17, 14), dynamic={"x": {0: "batch", 2: "height", 3: "width"}})
    assert [node.op for node in graph.nodes] == ["conv", "relu", "conv", "relu", "conv"]
    x = torch.randn(1, 4, 30, 31).double()
    torch.testing.assert_close(run(graph, [x])[0], model(x), rtol=1e-9, atol=1e-9)
