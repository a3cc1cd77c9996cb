"""Maps that read what lies side by side, or whose results may, and where they stay."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn, randn

from regauge.ir.cost import figures
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.passes.simplify.catalog import ALL_RULE_SETS
from simplified import refusals
from simplified import simplified as optimized
from simplifying import counts, made, ops, simplified

RULES = ALL_RULE_SETS["side-by-side"]


class Bottleneck(nn.Module):
    """Three narrow branches of one value, concatenated and mapped, beside a shortcut, as in a receptive field block."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(16, n, 1, bias=False) for n in (4, 4, 3)])
        self.norm = nn.ModuleList([nn.BatchNorm2d(n) for n in (4, 4, 3)])
        self.spread = nn.ModuleList([nn.Conv2d(n, 4, 3, padding=d, dilation=d) for n, d in ((4, 1), (4, 2), (3, 3))])
        self.join, self.shortcut = nn.Conv2d(12, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        branches = [s(n(d(x))) for d, n, s in zip(self.down, self.norm, self.spread, strict=True)]
        return torch.relu(self.join(torch.cat(branches, 1)) * 0.5 + self.shortcut(x))


def test_a_receptive_field_block() -> None:
    graph = optimized(Bottleneck(), randn(2, 16, 6, 5), dynamic={0: {0: "batch"}})
    assert counts(graph) == {"tanh": 1, "conv": 5, "split": 1, "concat": 1, "relu": 1}
    assert graph.parameters["join.weight"].shape == (16, 28, 1, 1) and graph.parameters["join.bias"].shape == (16,)
    apart = optimized(Bottleneck(), randn(2, 16, 6, 5), passes="simplify{skip=side-by-side}")
    assert counts(apart)["conv"] == 8 and counts(apart)["add"] == 1


def summed(what: str = "") -> Graph:
    """``conv(concat(x, tanh(x)), w) + conv(relu(x), v)`` with a difference that keeps it so."""

    def build_all(build: Builder, x: Value) -> Any:
        concat = build.concat(x, build.tanh(x), dim=2 if what == "axis" else 1)
        value = build.concat(x, x, dim=2) if what == "axis" else build.relu(x)
        value = build.concat(value, value, value, dim=1) if what == "wide" else value
        channels = 4 if what == "axis" else 8
        walk = {"stride": (2, 2)} if what == "stride" else {}
        groups = 2 if what == "groups" else 1
        w = build.parameter("w", randn(6 if groups == 1 else 4, channels // groups, 1, 1).double())
        first = build.conv(concat, w, groups=groups)
        size = (3, 3) if what == "kernel" else (1, 1)
        v = build.parameter("v", randn(6 if groups == 1 else 4, value.shape[1] // groups, *size).double())
        v = w if what == "shared" else v
        value = build.concat(value, value, dim=1) if what == "shared" else value
        padding = (1, 1) if what == "kernel" else (0, 0)
        second = build.conv(value, v, build.parameter("b", randn(6).double()) if groups == 1 else None,
                            **{"padding": padding, "groups": groups, **walk})  # fmt: skip
        if what == "stride":
            second = build.expand(build.mean(second, dims=(2, 3), keepdim=True), shape=first.shape)
        result = build.add(first, second)
        readers = {"readers": [build.exp(second)] if what == "readers" else [], "concat": [concat]}
        return [result, *readers.get(what, [])]

    return made(build_all, x=(2, 4, 3, 3))


def test_a_sum_of_two_maps_is_one_of_a_longer_concatenation() -> None:
    graph = summed()
    after = simplified(graph, RULES)
    assert ops(after) == ["tanh", "relu", "concat", "conv"]
    assert figures(after)[:2] == figures(graph)[:2] and after.parameters["w"].shape == (6, 12, 1, 1)


@pytest.mark.parametrize(
    ("what", "reason"),
    [("kernel", "walk differently"), ("groups", "in groups"), ("axis", "along another axis"),
     ("wide", "to copy its operand"), ("shared", "other readers")],
)  # fmt: skip
def test_a_sum_that_is_no_one_map_or_does_not_pay_stays(what: str, reason: str) -> None:
    assert reason in refusals(summed(what), RULES)


@pytest.mark.parametrize("what", ["stride", "readers", "concat"])
def test_a_sum_of_other_things_or_with_other_readers_stays(what: str) -> None:
    graph = summed(what)
    assert ops(simplified(graph, RULES)) == ops(graph)


def siblings(rows: tuple[int, ...], act: bool = False) -> Graph:
    def build_all(build: Builder, x: Value) -> Any:
        results = []
        for place, count in enumerate(rows):
            value = build.linear(x, build.parameter(f"w{place}", randn(count, 8).double()))
            value = build.relu(value) if act else value
            results.append(build.linear(value, build.parameter(f"v{place}", randn(2, count).double())))
        return results

    return made(build_all, x=(3, 8))


def test_three_narrow_siblings_are_one_map_and_a_split() -> None:
    after = simplified(siblings((3, 3, 2)), RULES)
    assert ops(after) == ["linear", "split", "linear", "linear", "linear"]
    assert [p.shape for p in after.parameters.values()].count((8, 8)) == 1


def test_siblings_that_are_wide_few_or_activated_stay() -> None:
    assert "to copy their results apart" in refusals(siblings((3, 3, 3)), RULES)
    for graph in (siblings((3, 3)), siblings((3, 3, 2), act=True)):
        assert ops(simplified(graph, RULES)) == ops(graph)
