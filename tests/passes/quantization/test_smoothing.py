"""Scales and shifts that move from activations to weights: the function stays, the expected error falls."""

from collections import Counter

import pytest
import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.calibration.statistics import Range, Spread, Statistics
from regauge.passes.quantization.grid import Grid
from regauge.passes.quantization.smoothing import Readers, smoothing_of
from regauge.passes.quantization.smoothing_moves import smooth

ACTIVATIONS, WEIGHTS = Grid(8, symmetric=False), Grid(8)


def network(norm: bool, *, read_elsewhere: bool = False) -> Graph:
    """A value of which one channel is large and off zero, read by two layers."""
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (40, 16), torch.float32)
    gain, shift = torch.rand(16) + 0.5, torch.randn(16)
    gain[3], shift[5] = 30.0, 25.0
    if norm:
        y = build.layer_norm(x, build.parameter("gain", gain), build.parameter("shift", shift), normalized_shape=(16,))
    else:
        y = build.gelu(x)
    layers = [
        build.linear(y, build.parameter(f"w{i}", torch.randn(8, 16)), build.parameter(f"b{i}", torch.randn(8)))
        for i in range(2)
    ]
    graph.outputs = [*layers, build.tanh(y)] if read_elsewhere else layers
    return graph


def readers_of(graph: Graph, x: torch.Tensor) -> Readers:
    layers = chosen_layers(graph, (), (), Counter(), lambda layer: None)
    value = layers[0].node.inputs[0]
    assert isinstance(value, Value)
    statistics = Statistics(graph)
    found = Readers(value, layers, statistics.register(value, Range(-1)), statistics.register(value, Spread(-1)))
    statistics.collect([(x,)])
    return found


@pytest.mark.parametrize(("norm", "elsewhere"), [(True, False), (True, True), (False, False)])
def test_the_function_stays(norm: bool, elsewhere: bool) -> None:
    """Into the norm where only the layers read it, else by nodes of their own."""
    graph = network(norm, read_elsewhere=elsewhere)
    x = torch.randn(40, 16)
    before = graph.run((x,))
    readers = readers_of(graph, x)
    found = smoothing_of(readers, ACTIVATIONS, WEIGHTS, None if norm else 0.5)
    found.share = 0.1  # worth any node
    assert smooth(graph, readers, found, by="test")
    for a, b in zip(before, graph.run((x,)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)
    assert ("mul" in [node.op for node in graph.nodes]) is not (norm and not elsewhere)


def test_a_large_channel_and_one_off_zero_lose_less() -> None:
    """Both are found: with a shift an eighth of the expected error is left, by an exponent alone more."""
    x = torch.randn(40, 16)
    readers = readers_of(network(norm=True), x)
    best = smoothing_of(readers, ACTIVATIONS, WEIGHTS)
    plain = min(smoothing_of(readers, ACTIVATIONS, WEIGHTS, power / 10).share for power in range(11))
    assert float(best.shift.abs().max()) > 20 and best.share < 0.15 and plain > 1.5 * best.share


def test_a_node_is_added_only_where_it_pays() -> None:
    graph = network(norm=False)
    readers = readers_of(graph, torch.randn(40, 16))
    found = smoothing_of(readers, ACTIVATIONS, WEIGHTS)
    assert found.share > 0.7 and not smooth(graph, readers, found, by="test")
