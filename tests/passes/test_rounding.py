"""Rounding holds for axes: products of Dims, sums of Dims, ratios, rankings and budgets."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from random_networks import networks
from regauge.ir.dims.extents import Concat, leaves, resolve
from regauge.ir.edit import Builder
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.optimize import optimize
from regauge.passes.pruning.prune import Prune
from regauge.passes.rounding import Rounding


def grouped_network(groups: int, channels: int) -> Graph:
    """A convolution to ``channels``, GroupNorm of ``groups``, and a convolution to two results."""
    graph = Graph("grouped")
    build = Builder(graph)
    x = build.input("x", (1, 3, 4, 4), torch.float64)
    generator = torch.Generator().manual_seed(0)

    def weight(name: str, *shape: int) -> object:
        return build.parameter(name, torch.randn(shape, generator=generator, dtype=torch.float64))

    y = build.conv(x, weight("first", channels, 3, 3, 3))
    y = build.group_norm(y, weight("gain", channels), weight("shift", channels), num_groups=groups)
    graph.outputs = [build.conv(y, weight("last", 2, channels, 1, 1))]
    return graph


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_the_axis_is_rounded_and_not_each_dim(scope: str) -> None:
    small = optimize(grouped_network(4, 32), f"prune{{compensate=false,ratio=0.5,round_to=16,scope={scope}}}")
    entry = small.report.passes[0]
    assert small.parameters["first"].shape == (16, 3, 3, 3) and small.parameters["last"].shape == (2, 16, 1, 1)
    assert "first:0: 32 -> 16  (4 x 8 -> 4 x 4)" in entry.lines()
    assert entry.left["no smaller size keeps its axes multiples of 16"] == 1


def test_later_factors_are_rounded_with_the_sizes_decided_so_far() -> None:
    small = optimize(grouped_network(8, 64), "prune{compensate=false,ratio=0.5,round_to=8}")
    assert "first:0: 64 -> 16  (8 x 8 -> 4 x 4)" in small.report.passes[0].lines()
    small = optimize(grouped_network(8, 64), "prune{compensate=false,ratio=0.75,round_to=32}")
    assert "first:0: 64 -> 32  (8 x 8 -> 8 x 4)" in small.report.passes[0].lines()


def test_a_ratio_multiplies_on_a_product_axis() -> None:
    small = optimize(grouped_network(4, 16), "prune{compensate=false,ratio=0.5}")
    assert "first:0: 16 -> 4  (4 x 4 -> 2 x 2)" in small.report.passes[0].lines()


def test_budget_is_met_with_rounded_axes() -> None:
    small = optimize(grouped_network(4, 64), "prune{compensate=false,params=0.6,round_to=16}")
    assert small.parameters["first"].shape[0] in (32, 16)
    with pytest.raises(PassError, match="cannot be met"):
        optimize(grouped_network(4, 32), "prune{compensate=false,params=0.2,round_to=16}")


def test_segments_of_a_sum_are_rounded_each() -> None:
    graph = Graph("sum")
    build = Builder(graph)
    x = build.input("x", (1, 3), torch.float64)
    a = build.linear(x, build.parameter("a", torch.randn(16, 3, dtype=torch.float64)))
    b = build.linear(x, build.parameter("b", torch.randn(12, 3, dtype=torch.float64)))
    joined = build.concat(a, b, dim=1)
    graph.outputs = [build.linear(joined, build.parameter("c", torch.randn(2, 28, dtype=torch.float64)))]
    small = optimize(graph, "prune{compensate=false,ratio=0.4,round_to=4}")
    assert [small.parameters[name].shape[0] for name in "ab"] == [8, 8]  # 9.6 and 7.2
    assert small.parameters["c"].shape == (2, 16)


@given(
    networks(),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([{"ratio": 0.4}, {"ratio": 0.7}, {"macs": 0.6}]),
    st.sampled_from(["uniform", "global"]),
)
def test_every_axis_that_was_cut_is_a_multiple(
    graph: Graph, multiple: int, amount: dict[str, float], scope: str
) -> None:
    try:
        small = optimize(graph, Prune(compensate=False, **amount, scope=scope, round_to=multiple))  # type: ignore[arg-type]
    except PassError as error:
        assert "cannot be met" in str(error)
        return
    for name, parameter in graph.parameters.items():
        for extent, before, after in zip(
            graph.axes.of[parameter], parameter.shape, small.parameters[name].shape, strict=True
        ):
            if before != after and not isinstance(resolve(extent), Concat):
                assert after % multiple == 0, (name, extent, before, after)


def test_nothing_is_asked_without_rounding_and_each_dim_is_ordered_minor_first() -> None:
    graph = grouped_network(4, 32)
    major, minor = leaves(graph.axes.of[graph.parameters["first"]][0])
    assert Rounding(graph, 1).needed(minor, {}) == 1
    rounding = Rounding(graph, 16)
    assert rounding.ordered([major, minor]) == [minor, major]
    assert (rounding.needed(minor, {}), rounding.needed(major, {minor: 6})) == (4, math.lcm(8))
