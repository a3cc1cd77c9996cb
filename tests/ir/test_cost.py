"""Figures of graphs: as numbers, as expressions in sizes of Dims, and step by step; against counts made by hand."""

import pytest
import sympy
import torch
from hypothesis import given

from random_networks import networks
from regauge.ir.cost import cost, figures, item_size, local_figures, smallest_sizes
from regauge.ir.graph import Graph
from regauge.ir.memory.activations import activation_bytes
from regauge.ir.sizes.expressions import floor_divide, symbol
from regauge.optimize import optimize
from small_graphs import multilayer_perceptron, residual_network


def test_perceptron_by_hand() -> None:
    graph = multilayer_perceptron(3, 7, 5)
    assert figures(graph) == (3 * 7 + 7 * 5, 4 * (3 * 7 + 7 * 5), 8 * (3 * 7 + 7 * 5))
    names = ("layer0.weight:1", "layer0.weight:0", "layer1.weight:0")
    a, b, c = (sympy.Symbol(name, integer=True, positive=True) for name in names)
    assert cost(graph).parameters == a * b + b * c
    assert cost(graph).macs == 4 * a * b + 4 * b * c


def test_dynamic_batch_counts_as_one_and_stays_in_the_expression() -> None:
    graph = residual_network(16, 1)
    convolutions = 9 * (3 * 16 + 16 * 32 + 32 * 16)
    assert figures(graph).macs == 64 * convolutions + 16 * 5
    assert "batch" in {str(symbol) for symbol in cost(graph).macs.free_symbols}  # type: ignore[union-attr]


def test_a_size_that_divides_by_nothing_at_the_least_sizes_counts_as_one() -> None:
    width = symbol("t")
    graph = Graph("halves", symbols={width: (1, None)})
    size = width / floor_divide(width, 2)
    assert smallest_sizes(graph)(size) == 1
    assert smallest_sizes(graph, {width: 6})(size) == 2


@given(networks())
def test_model_agrees_with_the_shapes_before_and_after_a_cut(graph: Graph) -> None:
    model = cost(graph)
    assert model.figures() == figures(graph)
    free = [group for group in graph.groups() if group.free]
    small = optimize(graph, "prune{compensate=false,ratio=0.5}")
    kept = {cut.dim: cut.after for cut in small.report.passes[0].cuts}
    assert model.figures({g.dim: kept[g.name] for g in free if g.name in kept}) == figures(small)


@given(networks())
def test_expression_agrees_with_the_numbers(graph: Graph) -> None:
    model = cost(graph)
    sizes = {symbol: dim.size for dim, symbol in model.symbols.items()}
    assert sympy.sympify(model.macs).subs(sizes) == figures(graph).macs
    assert sympy.sympify(model.bytes).subs(sizes) == figures(graph).bytes


@pytest.mark.parametrize("metric", ["parameters", "macs", "bytes"])
def test_running_figure_follows_changes(metric: str) -> None:
    graph = residual_network(16)
    model = cost(graph)
    running = model.running(metric)  # type: ignore[arg-type]
    dims = [group.dim for group in graph.groups() if group.free]
    expected = getattr(model.figures({dims[0]: 9, dims[1]: 3}), metric)
    running.set_sizes({dims[0]: 9})
    assert running.with_size(dims[1], 3) == pytest.approx(expected)
    assert running.set_sizes({dims[1]: 3}) == pytest.approx(expected)
    assert running.set_sizes({dims[0]: 16, dims[1]: dims[1].size}) == pytest.approx(running.original)


def test_activations() -> None:
    graph = multilayer_perceptron(3, 7, 5)
    total, peak = activation_bytes(graph)
    assert total == 8 * 4 * (3 + 7 + 7 + 5)
    assert peak == 8 * 4 * (7 + 7)


def test_item_sizes() -> None:
    sizes = [item_size(dtype) for dtype in (torch.float32, torch.bfloat16, torch.bool, "int4", "float4e2m1", "string")]
    assert sizes == [4, 2, 1, 0.5, 0.5, 0]


def test_figures_of_some_nodes_count_all_weights_that_they_read() -> None:
    graph = multilayer_perceptron(3, 7, 5)
    assert local_figures(graph.nodes, graph) == figures(graph)
    assert local_figures(graph.nodes[:1], graph) == (21, 4 * 21, 8 * 21)
