"""Structures of tensor networks: which axes are paired, and how large bonds are, found by local enumeration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import regauge
from layer_kinds import drawn
from regauge.frontends.capture import capture
from regauge.ir.cost import figures
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.orders import in_blocks
from regauge.passes.factorization.problems import Problem
from regauge.passes.factorization.splitting import split
from regauge.passes.factorization.structure_search import Search, Structure
from regauge.passes.factorization.structured import Structured


def form(name: str) -> Structured:
    found = FORMS[name]
    assert isinstance(found, Structured)
    return found


def linear(rows: int, columns: int) -> tuple[Graph, Layer]:
    graph = capture(nn.Linear(columns, rows, bias=False), (torch.zeros(2, columns),))
    (layer,) = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
    return graph, layer


SIZES = {"a": 4, "b": 3, "c": 2, "x": 2, "y": 4, "z": 3, "r": 4, "s": 1}


def paired_otherwise() -> torch.Tensor:
    """An MPO of unequal bonds whose output axes come in the order z x y."""
    net = replace(form("mpo").network, outputs="zxy")
    factors = [drawn(*(SIZES[axis] for axis in own), seed=place) for place, own in enumerate(net.factors)]
    return net.image(factors, SIZES)


def test_the_pairing_and_unequal_bonds_are_found() -> None:
    """With the plain pairing nothing near it is exact at this size; with bonds alike neither."""
    graph, layer = linear(24, 24)
    problem = Problem(layer, paired_otherwise())
    net = form("mpo").network
    most = net.parameters(SIZES), net.products({**SIZES, "r": 6, "s": 6})
    start = Structure(net, {**SIZES, "r": 2, "s": 2})
    search = Search(problem, [{axis: SIZES[axis] for axis in net.axes}], True, most)
    assert net.parameters(start.sizes) <= most[0]
    found = search.bettered(start)
    assert search._loss(start) > 0.3
    assert search._loss(found) < 1e-20
    assert found.network.outputs == "zxy" and (found.sizes["r"], found.sizes["s"]) == (4, 1)
    assert found.network.parameters(found.sizes) <= most[0] and found.network.products(found.sizes) <= most[1]
    assert len(search._losses) < 60  # all orders with all bonds would be 6 * 24 * 6


@pytest.mark.parametrize("name", ["mpo", "btt", "kronecker"])
def test_searched_choices_lose_no_more_at_no_more_cost(name: str) -> None:
    graph, layer = linear(16, 24)
    problem = Problem(layer, drawn(16, 24))
    plain = form(name).choices(problem, graph, 1)
    searched = replace(form(name), searched=True).choices(problem, graph, 1)
    for choice in plain:
        within = [own.loss for own in searched if own.parameters <= choice.parameters and own.macs <= choice.macs]
        assert min(within) <= choice.loss * 1.02
    assert min(own.loss - 0.001 * own.parameters for own in searched) <= min(
        own.loss - 0.001 * own.parameters for own in plain
    )
    for choice in searched[:: max(1, len(searched) // 4)]:
        links, matrix = form(name).links(problem, choice.numbers)
        assert sum(link.weight.numel() for link in links) == choice.parameters
        assert problem.error(matrix) <= choice.loss * 1.0001


def test_the_option_searches_and_runs() -> None:
    torch.manual_seed(0)
    model = nn.Linear(24, 24, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(paired_otherwise())
    x = drawn(5, 24)
    graph = capture(model, (x,), dynamic={0: {0: "batch"}})
    errors = []
    for search in ("false", "true"):
        small = regauge.optimize(graph, f"factorize{{params=0.25,form=mpo,search={search}}}")
        assert figures(small).parameters <= 0.25 * 24 * 24
        errors.append(float((small.run(x)[0] - graph.run(x)[0]).norm() / graph.run(x)[0].norm()))
        assert torch.allclose(small.to_torch()(x), small.run(x)[0])
    assert errors[1] < 0.8 * errors[0], errors


class Hidden(nn.Module):
    """A second layer that is a sum of Kronecker products, but for the order of its inputs, the hidden channels."""

    def __init__(self, order: torch.Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 12)
        weight = torch.kron(drawn(3, 4, seed=1), drawn(4, 6, seed=2)).float()
        self.second.weight.data = weight[:, order]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.relu(self.first(x)))
        return found


def test_hidden_channels_take_the_places_that_suit_a_network_without_blocks() -> None:
    """A few channels in wrong places are found; of all in any order it is a better one that is."""
    torch.manual_seed(0)
    swapped = torch.arange(24)
    swapped[[1, 20, 7]] = swapped[[20, 7, 1]]
    sizes = {"n": 4, "q": 6, "m": 3, "p": 4, "s": 1}
    net = form("kronecker").network
    for order, most in ((swapped, 1e-6), (torch.randperm(24), 0.85)):
        x = torch.randn(6, 8)
        graph = capture(Hidden(order).eval(), (x,))
        (layer,) = [own for node in graph.nodes if (own := layer_of(node)) and own.weight.name == "second.weight"]
        ordered, moved = in_blocks(graph, [(layer, net, sizes)], by="test")
        assert [dim.size for dim in moved] == [24]
        assert torch.allclose(ordered.run(x)[0], graph.run(x)[0], atol=1e-5)
        lost = []
        for one in (graph, ordered):
            given = Problem(layer, one.parameters["second.weight"].tensor.detach().double())
            lost.append(given.error(net.image(split(net, given, sizes), sizes)))
        assert lost[1] < most * lost[0]
