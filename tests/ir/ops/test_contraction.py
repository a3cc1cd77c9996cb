"""Contractions: what is summed over may be cut on both sides; an einsum's equation is its rule."""

import pytest
import torch
from torch import randn

from cutting import cut_all, free_sizes
from regauge.ir.dims.groups import find_group
from regauge.ir.edit import Builder
from regauge.ir.gauge.classes import Gauge, gauges
from regauge.ir.graph import Graph, Value
from regauge.ir.operator import Cost, find_aten
from regauge.ir.ops.einsum import explicit_equation
from regauge.ir.running.interpret import run


def network(*shape: int) -> tuple[Graph, Builder, Value]:
    graph = Graph()
    build = Builder(graph)
    return graph, build, build.input("x", shape, torch.float32)


def roles(value: Value, graph: Graph) -> dict[str, str]:
    """Role by the text of the extent, of the node that computes a value."""
    return {str(extent): role for role, extent in graph.axes.calls[value.producer].roles}  # type: ignore[index]


def test_attention_by_einsum_frees_heads_and_head_dims() -> None:
    graph, build, x = network(2, 5, 6)

    def heads(name: str) -> Value:
        return build.reshape(build.linear(x, build.parameter(name, randn(8, 6))), shape=(2, 5, 2, 4))

    q, k, v = heads("q"), heads("k"), heads("v")
    scores = build.einsum(q, k, equation="bihd,bjhd->bhij")
    mixed = build.einsum(scores, v, equation="bhij,bjhd->bihd")
    graph.outputs = [build.linear(build.reshape(mixed, shape=(2, 5, 8)), build.parameter("o", randn(6, 8)))]
    cut_all(graph, [randn(2, 5, 6)])
    assert free_sizes(graph) == {"q:0.0": 2, "q:0.1": 4, "v:0.1": 4}


def test_roles_follow_from_the_equation() -> None:
    graph, build, x = network(2, 5, 6)
    y = build.einsum(x, build.parameter("w", randn(6, 7)), equation="...d,de->...e")
    graph.outputs = [y]
    assert {role for role, _ in graph.axes.calls[y.producer].roles} == {"contract", "produce"}


@pytest.mark.parametrize(
    ("equation", "explicit"),
    [
        ("ij,jk", "ij,jk->ik"),
        (" b i d , b j d -> b i j ", "bid,bjd->bij"),
        ("...ij,jk", "...ij,jk->...ik"),
        ("ba", "ba->ab"),
        ("ii", "ii->"),
        ("aB", "aB->Ba"),
    ],
)
def test_implicit_results_are_written_out(equation: str, explicit: str) -> None:
    assert explicit_equation(equation) == explicit


def test_a_diagonal_ties_its_two_axes() -> None:
    graph, build, x = network(2, 3)
    square = build.parameter("square", randn(4, 4))
    h = build.mul(build.linear(x, build.parameter("a", randn(4, 3))), build.einsum(square, equation="ii->i"))
    graph.outputs = [build.linear(h, build.parameter("b", randn(5, 4)))]
    small = cut_all(graph, [randn(2, 3)])
    assert free_sizes(graph) == {"square:0": 4} or free_sizes(graph) == {"a:0": 4}
    assert small.parameters["square"].shape == (2, 2)


def test_broadcast_ones_of_an_einsum_stay_ones() -> None:
    graph, build, x = network(2, 1, 4)
    h = build.einsum(x, build.parameter("w", randn(2, 3, 4)), equation="bij,bij->bi")
    graph.outputs = [h]
    assert graph.axes.problems == []
    image = randn(2, 1, 4)
    torch.testing.assert_close(run(graph, [image])[0], (image * graph.parameters["w"].tensor).sum(-1))


@pytest.mark.parametrize("equation", ["bhid,bhjd->bhij", "...id,...jd->...ij"])
def test_macs_of_an_einsum_are_the_product_of_all_letters(equation: str) -> None:
    _, build, x = network(2, 3, 4, 5)
    h = build.einsum(x, build.parameter("k", randn(2, 3, 6, 5)), equation=equation)
    assert h.producer.operator.macs(Cost(h.producer)) == 2 * 3 * 4 * 6 * 5


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 2.0), (0, 1)])
def test_addmm_is_a_matmul_and_an_add(beta: float, alpha: float) -> None:
    graph, build, x = network(2, 3)
    bias, weight = build.parameter("bias", randn(4)), build.parameter("weight", randn(3, 4))
    found = find_aten("addmm.default")
    assert found is not None and found[1] is not None
    graph.outputs = [found[1](build, bias, x, weight, beta=beta, alpha=alpha)]
    rows = randn(2, 3)
    expected = torch.addmm(bias.tensor, rows, weight.tensor, beta=beta, alpha=alpha)
    torch.testing.assert_close(run(graph, [rows])[0], expected)


def test_bilinear_frees_all_three_axes() -> None:
    graph, build, x = network(2, 3)
    left = build.linear(x, build.parameter("left", randn(4, 3)))
    right = build.linear(x, build.parameter("right", randn(6, 3)))
    h = build.bilinear(left, right, build.parameter("w", randn(8, 4, 6)), build.parameter("w.bias", randn(8)))
    graph.outputs = [build.linear(h, build.parameter("last", randn(5, 8)))]
    cut_all(graph, [randn(2, 3)])
    assert free_sizes(graph) == {"left:0": 4, "right:0": 6, "w:0": 8}


def test_linear_layers_are_written_as_torch_prints_them() -> None:
    _, build, x = network(2, 3)
    h = build.linear(x, build.parameter("w", randn(4, 3)))
    assert h.producer.operator.layer(h.producer) == "nn.Linear(3, 4, bias=False)"


def test_a_bias_fixes_what_a_linear_layer_maps_over() -> None:
    """Mixing tokens with a linear layer: its bias is the same for every channel, so channels can only be permuted."""
    found = []
    for bias in (True, False):
        graph, build, x = network(2, 5, 3)
        h = build.linear(x, build.parameter("a", randn(8, 3)))
        h = build.permute(h, dims=(0, 2, 1))
        h = build.linear(h, build.parameter("t", randn(5, 5)), *([build.parameter("t.bias", randn(5))] if bias else []))
        graph.outputs = [build.linear(build.permute(h, dims=(0, 2, 1)), build.parameter("b", randn(4, 8)))]
        found.append(gauges(graph)[find_group(graph, "a:0").dim])
    assert found[0] == Gauge.PERMUTE and Gauge.GENERAL in found[1]


def test_concatenated_channels_keep_the_gauge_of_their_own_producer() -> None:
    graph, build, x = network(2, 3)
    h = build.concat(*(build.linear(x, build.parameter(name, randn(8, 3))) for name in "ab"), dim=1)
    graph.outputs = [build.linear(h, build.parameter("c", randn(4, 16)))]
    assert all(Gauge.GENERAL in gauges(graph)[find_group(graph, f"{name}:0").dim] for name in "ab")
