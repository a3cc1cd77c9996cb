"""Sibling linear maps as one wide map, where it is asked for."""

from collections import Counter

import torch
from torch import nn

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.passes.simplify.catalog import ALL_RULE_SETS
from simplified import refusals, simplified

RULES = ALL_RULE_SETS["merges"]


class Layer(nn.Module):
    """Attention with three projections beside a gated layer, and two feed-forward layers of one value."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((8, True), (4, False), (4, True), (8, True))
        self.q, self.k, self.v, self.o = (nn.Linear(8, n, bias=bias) for n, bias in widths)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.left, self.right = (nn.Sequential(nn.Linear(8, n), nn.GELU(), nn.Linear(n, 8)) for n in (6, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x)
        q, k, v = (p(y).view(2, 5, -1, 2).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(x.shape)
        y = torch.relu(self.o(y))
        y = torch.relu(self.down(nn.functional.silu(self.gate(y)) * self.up(y)))
        return self.left(y) + self.right(y)


def test_siblings_are_merged_only_where_it_is_asked_for() -> None:
    x = torch.randn(2, 5, 8)
    plain = Counter(node.op for node in simplified(Layer(), x).nodes)
    assert (plain["linear"], plain["split"]) == (11, 0)
    merged = simplified(Layer(), x, passes="simplify{also=merges}")
    counts = Counter(node.op for node in merged.nodes)
    assert (counts["linear"], counts["split"], counts["gelu"]) == (6, 2, 1)
    assert {"q_k_v.weight", "q_k_v.bias", "gate_up.weight", "left.0_0.weight"} <= set(merged.parameters)
    alone = simplified(Layer(), x, passes="simplify{only=three-siblings}")
    assert Counter(node.op for node in alone.nodes)["linear"] == 9


def siblings(first: tuple[int, ...], second: tuple[int, ...], **attributes: object) -> Graph:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 4, 5, 5), torch.float64)
    w, v = (build.parameter(n, torch.randn(s).double()) for n, s in (("w", first), ("v", second)))
    graph.outputs = [build.conv(x, w, stride=(1, 1)), build.conv(x, v, **{"stride": (1, 1), **attributes})]
    return graph


def test_convolutions_that_walk_differently_stay() -> None:
    assert "walk differently" in refusals(siblings((3, 4, 1, 1), (2, 4, 1, 1), stride=(2, 2)), RULES)
    assert "different sizes" in refusals(siblings((3, 4, 1, 1), (2, 4, 3, 3)), RULES)


def test_channels_in_groups_stay() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 4, 5, 5), torch.float64)
    graph.outputs = [build.conv(x, build.parameter(n, torch.randn(4, 2, 1, 1).double()), groups=2) for n in "wv"]
    assert "in groups" in refusals(graph, RULES)


def test_a_tied_weight_stays() -> None:
    graph = Graph()
    build = Builder(graph)
    x, w = build.input("x", (2, 4), torch.float64), build.parameter("w", torch.randn(4, 4).double())
    graph.outputs = [build.linear(x, w), build.linear(x, w, build.parameter("b", torch.randn(4).double()))]
    assert "w has other readers" in refusals(graph, RULES)


class Branches(nn.Module):
    """Four pointwise convolutions of one value, each with a batch norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) * part(x).tanh() for part in self.parts], 1)


def test_batch_norms_are_folded_before_their_convolutions_are_merged() -> None:
    merged = simplified(Branches().eval(), torch.randn(2, 6, 5, 5), passes="simplify{also=merges}")
    counts = Counter(node.op for node in merged.nodes)
    assert (counts["conv"], counts["batch_norm"]) == (1, 0)
