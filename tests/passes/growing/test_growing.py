"""``grow`` and ``coalesce``: wider networks compute the same, and what they were made of is found again."""

from __future__ import annotations

import pytest
import torch

import regauge
from layered_networks import GroupedDecoder, ids, redrawn
from regauge.frontends.capture import capture
from regauge.ir.edit import Builder
from regauge.ir.errors import GraphError, PassError
from regauge.ir.graph import Graph
from regauge.passes.growing.coalesce import coalesce
from small_graphs import multilayer_perceptron, residual_network


def case(name: str) -> tuple[Graph, torch.Tensor, int]:
    """A graph, an input, and how many of its Dims can be wider."""
    torch.manual_seed(0)
    if name == "residual":
        return residual_network(), torch.randn(2, 3, 8, 8).double(), 3
    if name == "norms":
        return multilayer_perceptron(6, 8, 8, 3, norm=True), torch.randn(4, 6).double(), 2
    return capture(redrawn(GroupedDecoder()).double().eval(), (ids(),), dynamic={0: {0: "batch"}}), ids(5, 3), 13


def count(graph: Graph) -> int:
    return sum(parameter.tensor.numel() for parameter in graph.all_parameters())


@pytest.mark.parametrize("name", ["residual", "norms", "attention"])
def test_a_wider_network_computes_the_same_and_coalesces_to_what_it_was(name: str) -> None:
    graph, x, dims = case(name)
    (wanted,) = graph.run((x,))
    for split in ("even", "uneven"):
        wide = regauge.optimize(graph, f"grow{{split={split}}}")
        assert len(wide.report.passes[0].cuts) == dims and count(wide) > 2.9 * count(graph)
        torch.testing.assert_close(wide.run((x,))[0], wanted, rtol=0, atol=1e-12)
        small = coalesce(wide)
        assert count(small.graph) == count(graph)
        torch.testing.assert_close(small.graph.run((x,))[0], wanted, rtol=0, atol=1e-12)
        back = small.back()
        torch.testing.assert_close(back.run((x,))[0], wanted, rtol=0, atol=1e-12)
        if split == "even":
            for own, other in zip(back.all_parameters(), wide.all_parameters(), strict=True):
                torch.testing.assert_close(own.tensor, other.tensor, rtol=0, atol=1e-12)


def test_any_network_coalesces_and_its_half_comes_back_in_its_shapes() -> None:
    graph, x, _ = case("attention")
    found = coalesce(graph)
    (wanted,) = found.graph.run((x,))
    assert count(found.graph) < 0.3 * count(graph)
    whole, half = found.back(), found.back(share=0.25)
    torch.testing.assert_close(whole.run((x,))[0], wanted, rtol=0, atol=1e-12)
    for name, old in graph.parameters.items():
        if old.kind == "parameter":
            mixed = 0.25 * whole.parameters[name].tensor + 0.75 * old.tensor
            torch.testing.assert_close(half.parameters[name].tensor, mixed)
    with pytest.raises(PassError, match="share"):
        found.back(share=2)
    with pytest.raises(GraphError, match="when it was coalesced"):
        found.back(graph)


def test_parts_of_a_width_are_left_where_a_mean_is_taken() -> None:
    graph, x, _ = case("residual")
    some = regauge.optimize(graph, "grow{factor=1.5}")
    assert sorted((cut.before, cut.after) for cut in some.report.passes[0].cuts) == [(16, 24), (32, 48), (32, 48)]
    torch.testing.assert_close(some.run((x,))[0], graph.run((x,))[0], rtol=0, atol=1e-12)
    left = regauge.optimize(case("norms")[0], "grow{factor=1.5}").report.passes[0].left
    assert left["something takes the mean of its indices: a whole factor keeps it"] == 2


def test_what_adds_indices_up_by_itself_lets_no_copies_be() -> None:
    graph = Graph()
    build = Builder(graph)
    hidden = build.linear(build.input("x", (4, 6), torch.float64), build.parameter("a", torch.randn(8, 6).double()))
    graph.outputs = [build.linear(build.softmax(hidden, dim=1), build.parameter("c", torch.randn(6, 8).double()))]
    assert regauge.optimize(graph, "grow").report.passes[0].left["softmax adds its indices up"] == 1
