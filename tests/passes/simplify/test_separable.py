"""Kernels of convolutions that are products or have borders of zeros, where it is asked for."""

from collections import Counter

import torch
from torch import nn

from regauge.ir.cost import figures
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.passes.simplify.catalog import ALL_RULE_SETS
from simplified import refusals, simplified

RULES = ALL_RULE_SETS["separable"]


class Blurred(nn.Module):
    """A depthwise blur with binomial kernels, as anti-aliased networks have it, and a pruned 7x7 convolution."""

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 4, 6, 4, 1])
        self.register_buffer("blur", (line[:, None] * line / 256).expand(4, 1, 5, 5).clone())
        self.pruned = nn.Conv2d(4, 6, 7, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pruned(torch.relu(nn.functional.conv2d(x, self.blur, stride=2, padding=2, groups=4)))


class Trimmed(Blurred):
    """The weights that the sharing helper redraws, brought back to what the test is about."""

    def double(self) -> "Trimmed":
        super().double()
        line = torch.tensor([1.0, 4, 6, 4, 1]).double()
        self.blur.data = (line[:, None] * line / 256).expand(4, 1, 5, 5).clone()
        with torch.no_grad():
            self.pruned.weight[:, :, :2] = 0
            self.pruned.weight[:, :, -3:] = 0
            self.pruned.weight[..., :1] = 0
            self.pruned.weight[..., -1:] = 0
        return self


def test_kernels_are_split_and_trimmed_only_where_it_is_asked_for() -> None:
    x = torch.randn(2, 4, 16, 16)
    plain = simplified(Trimmed(), x)
    assert Counter(node.op for node in plain.nodes) == {"conv": 2, "relu": 1}
    graph = simplified(Trimmed(), x, passes="simplify{also=separable}")
    shapes = [tuple(node.inputs[1].shape) for node in graph.nodes if node.op == "conv"]  # type: ignore[union-attr]
    assert shapes == [(4, 1, 5, 1), (4, 1, 1, 5), (6, 4, 3, 5)]
    assert graph.nodes[-1].attributes["padding"] == (1, 2)
    assert (figures(plain).macs, figures(graph).macs) == (163328, 53760)


def convolution(weight: torch.Tensor, **attributes: object) -> Graph:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (1, 4, 9, 9), weight.dtype)
    graph.outputs = [build.conv(x, build.parameter("w", weight), **attributes)]
    return graph


def test_kernels_that_stay() -> None:
    random = torch.randn(4, 1, 3, 3).double()
    assert "no products of a column and a row" in refusals(convolution(random, groups=4), RULES)
    line = torch.rand(4, 1, 3, 1).double() + 1
    dense = (line * line.mT).expand(4, 4, 3, 3).clone()
    assert "no depthwise convolution" in refusals(convolution(dense), RULES)
    short = torch.rand(4, 1, 2, 1).double() + 1
    split = refusals(convolution(short * short.mT, groups=4), RULES)
    assert "merged they would have 16 parameters and 1088 MACs, not 16 and 1024" in split
    bordered = torch.randn(4, 4, 5, 5).double()
    bordered[:, :, 0] = bordered[:, :, -1] = 0
    assert "that its padding covers" in refusals(convolution(bordered, padding=(0, 2)), RULES)
    bordered[0, 0, 0, 0] = 1e-9
    assert "have no border of zeros" in refusals(convolution(bordered, padding=2), RULES)
