"""Structured forms of linear layers: what stands in the graph, how little is lost, what other passes make of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.cost import figures, local_figures
from regauge.ir.edit import remove_dead
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import layer_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.chains import write_chain
from regauge.passes.factorization.curvature import inverse_curvature
from regauge.passes.factorization.forms import Choice
from regauge.passes.factorization.least_squares import bettered
from regauge.passes.factorization.networks import Network
from regauge.passes.factorization.orders import in_blocks
from regauge.passes.factorization.problems import Problem, plain_problems
from regauge.passes.factorization.splitting import split
from regauge.passes.factorization.structured import Structured

NAMES = [name for name, form in FORMS.items() if isinstance(form, Structured)]


def form(name: str) -> Structured:
    found = FORMS[name]
    assert isinstance(found, Structured)
    return found


@cache
def network() -> tuple[Graph, list[torch.Tensor], torch.Tensor]:
    """Two linear layers with a wide hidden one, and inputs near a few directions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 12)).eval()
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(24, 24, generator=generator) * torch.logspace(0, -2, 24)[:, None]
    data = torch.randn(96, 8, 24, generator=generator) @ basis
    graph = capture(model, (data[:2],), dynamic={0: {0: "batch", 1: "time"}})
    return graph, list(data[:64].split(32)), data[64:]


def problem(rows: int, columns: int) -> Problem:
    """A linear layer with strongly correlated inputs and outputs."""
    generator = torch.Generator().manual_seed(1)
    graph = capture(nn.Linear(columns, rows).double(), (torch.zeros(2, columns, dtype=torch.float64),))
    (layer,) = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
    metrics = []
    for size in (columns, rows):
        mixed = torch.randn(size, size, generator=generator).double() * torch.logspace(0, -1.5, size).double()[:, None]
        metrics.append(mixed.t() @ mixed + 1e-6 * torch.eye(size).double())
    return Problem(layer, torch.randn(rows, columns, generator=generator).double(), *metrics)


def middle(name: str, given: Problem) -> Choice:
    """A choice of about half of the parameters, its axes all greater than one where the form has such."""
    graph = capture(nn.Linear(given.layer.columns, given.layer.outputs), (torch.zeros(2, given.layer.columns),))
    choices = form(name).choices(given, graph, 1)
    half = given.weight.numel() / 2
    return min(choices, key=lambda choice: (min(choice.axes) == 1, abs(choice.parameters - half)))


@pytest.mark.parametrize("name", NAMES)
def test_metrics_of_data_lose_less_than_plain_ones(name: str) -> None:
    """So that a metric on the wrong side is noticed: then as much is lost as without."""
    given = problem(12, 16)
    numbers = middle(name, given).numbers
    _, plain = form(name).links(Problem(given.layer, given.weight), numbers)
    links, matrix = form(name).links(given, numbers)
    assert given.error(matrix) < 0.6 * given.error(plain)
    assert 1 <= len(links) <= 3


@pytest.mark.parametrize("name", NAMES)
def test_turns_lose_no_more_than_the_first_guess(name: str) -> None:
    given = problem(12, 16)
    choice = middle(name, given)
    _, matrix = form(name).links(given, choice.numbers)
    assert given.error(matrix) <= choice.loss * 1.0001


@pytest.mark.parametrize("name", NAMES)
def test_choices_tell_the_costs_of_the_written_layers(name: str) -> None:
    graph, _, _ = network()
    for original in [layer for node in graph.nodes if (layer := layer_of(node)) is not None]:
        (given,) = plain_problems(original)
        choices = form(name).choices(given, graph, 1)
        for choice in choices[:: max(1, len(choices) // 3)]:
            changed = graph.copy()
            (own,) = [
                layer
                for node in changed.nodes
                if (layer := layer_of(node)) is not None and layer.weight.name == original.weight.name
            ]
            links, matrix = form(name).links(given, choice.numbers)
            write_chain(changed, own, links, by="test")
            added = [node for node in changed.nodes if node.metadata.get("regauge.added_by") == "test"]
            assert (
                local_figures([node for node in added if node.op in ("linear", "matmul")], changed).macs == choice.macs
            )
            assert sum(link.weight.numel() for link in links) == choice.parameters < given.weight.numel()
            assert given.error(matrix) <= choice.loss * 1.0001 + 1e-12


def test_two_factors_without_data_are_the_best() -> None:
    """Each block of a Monarch matrix loses the tail of its own singular values."""
    given = problem(12, 16)
    plain = Problem(given.layer, given.weight)
    sizes = {"k": 4, "i": 4, "l": 4, "j": 3, "r": 1}
    net = form("monarch").network
    off = given.weight - net.image(split(net, plain, sizes), sizes)
    blocks = given.weight.reshape(4, 3, 4, 4).permute(1, 2, 0, 3)
    assert float(off.square().sum()) == pytest.approx(float(torch.linalg.svdvals(blocks)[..., 1:].square().sum()))


def test_a_kronecker_sum_is_that_of_van_loan() -> None:
    given = problem(12, 16)
    plain = Problem(given.layer, given.weight)
    sizes = {"n": 4, "q": 4, "m": 3, "p": 4, "s": 2}
    net = form("kronecker").network
    b, a = split(net, plain, sizes)
    assert torch.allclose(net.image([b, a], sizes), torch.kron(a[0], b[0]) + torch.kron(a[1], b[1]))
    off = given.weight - net.image([b, a], sizes)
    rearranged = given.weight.reshape(3, 4, 4, 4).permute(0, 2, 1, 3).reshape(12, 16)
    assert float(off.square().sum()) == pytest.approx(float(torch.linalg.svdvals(rearranged)[2:].square().sum()))


def test_a_matrix_product_operator_loses_no_more_than_its_unfoldings_together() -> None:
    """Oseledets (2011), theorem 2.2, for the train over the merged axes a x, b y and c z; nor less than one of them."""
    given = problem(12, 16)
    sizes = {"a": 4, "b": 2, "c": 2, "x": 2, "y": 3, "z": 2, "r": 3, "s": 2}
    net = form("mpo").network
    off = given.weight - net.image(split(net, Problem(given.layer, given.weight), sizes), sizes)
    train = given.weight.reshape(2, 3, 2, 4, 2, 2).permute(3, 0, 4, 1, 5, 2)
    tails = [
        float(torch.linalg.svdvals(unfolding)[rank:].square().sum())
        for unfolding, rank in ((train.reshape(8, 24), 3), (train.reshape(48, 4), 2))
    ]
    assert max(tails) - 1e-9 <= float(off.square().sum()) <= sum(tails) + 1e-9


def test_whitening_is_exact_where_the_metric_lies_in_blocks() -> None:
    """Then no turns are needed: the first guess is the best in the metric."""
    given = problem(12, 16)
    assert given.inputs is not None
    grid = given.inputs.reshape(4, 4, 4, 4)
    blocks = torch.block_diag(*(grid[k, :, k, :] for k in range(4)))
    known = Problem(given.layer, given.weight, blocks)
    sizes = {"k": 4, "i": 4, "l": 4, "j": 3, "r": 1}
    net = form("monarch").network
    first = known.error(net.image(split(net, known, sizes), sizes))
    _, matrix = form("monarch").links(known, (1, 4, 4, 4, 3))
    assert first == pytest.approx(known.error(matrix), rel=1e-6)
    assert first < known.error(net.image(split(net, Problem(given.layer, given.weight), sizes), sizes))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_runs_everywhere_and_can_be_pruned(name: str, tmp_path: Path) -> None:
    graph, data, held_out = network()
    small = regauge.optimize(graph, f"factorize{{params=0.7,form={name}}}", data=data)
    assert figures(small).parameters <= 0.7 * figures(graph).parameters
    (wanted,) = small.run(held_out)
    module = small.to_torch()
    assert torch.allclose(module(held_out), wanted, atol=1e-5)
    assert all(parameter.requires_grad for parameter in module.parameters())
    module(held_out).square().mean().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    path = tmp_path / "small.onnx"
    small.to_onnx(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: held_out.numpy()})
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-4)
    pruned = regauge.optimize(small, "prune{params=0.8}")
    assert figures(pruned).parameters < 0.85 * figures(small).parameters
    assert pruned.run(held_out[:1])[0].shape == (1, 8, 12)


def test_names_tell_what_became_of_a_layer() -> None:
    graph, data, _ = network()
    small = regauge.optimize(graph, "factorize{rank=1,form=monarch,include=1.*}", data=data)
    state: dict[str, Any] = small.to_torch().state_dict()
    assert {"1.down.weight", "1.up.weight", "1.up.bias", "3.weight"} <= set(state)
    ops = [node.op for node in small.nodes if node.op in ("linear", "matmul", "add")]
    assert ops == ["matmul", "matmul", "add", "linear"] or ops[-1] == "linear"
    assert "1.weight (monarch " in str(small.report)


def test_multiplications_are_within_their_budget() -> None:
    graph, _, _ = network()
    small = regauge.optimize(graph, "factorize{macs=0.6,form=kronecker}")
    assert 0.4 < figures(small).macs / figures(graph).macs <= 0.6


def test_sizes_that_cannot_be_split_are_left_whole() -> None:
    graph = capture(nn.Linear(7, 5), (torch.zeros(2, 7),))
    small = regauge.optimize(graph, "factorize{rank=1,form=monarch}")
    assert "monarch needs sizes that can be divided" in str(small.report)


def test_axes_of_size_one_leave_no_trace() -> None:
    net = Network("nq", "mp", ("spq", "smn"))
    sizes = {"n": 1, "q": 6, "m": 4, "p": 1, "s": 2}
    factors = [torch.randn(2, 1, 6), torch.randn(2, 4, 1)]
    links = net.links(factors, sizes)
    assert [tuple(link.weight.shape) for link in links] == [(2, 6), (4, 2)]
    graph = capture(nn.Linear(6, 4), (torch.zeros(3, 6),))
    (layer,) = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
    write_chain(graph, layer, links, by="test")
    remove_dead(graph)
    assert [node.op for node in graph.nodes] == ["linear", "linear"]
    x = torch.randn(3, 6)
    assert torch.allclose(graph.run(x)[0] - layer.bias.tensor, x @ net.image(factors, sizes).t(), atol=1e-5)  # type: ignore[union-attr]


def test_preconditioned_steps_go_further() -> None:
    given = problem(12, 16)
    sizes = {"n": 4, "q": 4, "m": 3, "p": 4, "s": 3}
    net = form("kronecker").network
    factors = split(net, given, sizes)
    errors = []
    for divided in (lambda gradient: gradient, inverse_curvature(net, given, sizes, factors, 1)):
        found = bettered(given, lambda one: net.image([factors[0], one], sizes), factors[1], divided, 2)
        errors.append(given.error(net.image([factors[0], found], sizes)))
    assert errors[1] < 0.9 * errors[0]


def test_the_curvature_of_a_last_dense_factor_is_exact() -> None:
    """One step is a least squares solution: further ones gain nothing."""
    given = problem(12, 16)
    sizes = {"k": 4, "i": 4, "m": 12, "r": 2}
    net = form("block-dense").network
    factors = split(net, given, sizes)
    errors = []
    for steps in (1, 30):
        divided = inverse_curvature(net, given, sizes, factors, 1)
        found = bettered(given, lambda one: net.image([factors[0], one], sizes), factors[1], divided, steps)
        errors.append(given.error(net.image([factors[0], found], sizes)))
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


class Hidden(nn.Module):
    """A second layer that is a Monarch matrix, but for the order of its inputs, the hidden channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 24)
        generator = torch.Generator().manual_seed(3)
        factors = [torch.randn(4, 4, 1, 6, generator=generator), torch.randn(4, 6, 4, 1, generator=generator)]
        weight = form("monarch").network.image(factors, {"k": 4, "i": 6, "l": 6, "j": 4, "r": 1})
        self.second.weight.data = weight[:, torch.randperm(24, generator=generator)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.relu(self.first(x)))
        return found


def test_the_order_of_hidden_channels_is_found() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    graph = capture(Hidden().eval(), (x,))
    (layer,) = [layer for node in graph.nodes if (layer := layer_of(node)) and layer.weight.name == "second.weight"]
    sizes = {"k": 4, "i": 6, "l": 6, "j": 4, "r": 1}
    net = form("monarch").network
    ordered, moved = in_blocks(graph, [(layer, net, sizes)], by="test")
    assert [dim.size for dim in moved] == [24]
    assert torch.allclose(ordered.run(x)[0], graph.run(x)[0], atol=1e-5)
    lost = []
    for one in (graph, ordered):
        given = Problem(layer, one.parameters["second.weight"].tensor.detach().double())
        lost.append(given.error(net.image(split(net, given, sizes), sizes)))
    assert lost[0] > 0.2
    assert lost[1] < 1e-9


def test_reordering_can_be_refused_and_leaves_what_is_read_in_order() -> None:
    torch.manual_seed(0)
    graph = capture(Hidden().eval(), (torch.randn(6, 8),))
    reports = [
        str(regauge.optimize(graph, f"factorize{{params=0.5,form=monarch,permute={on}}}").report)
        for on in ("true", "false")
    ]
    assert "channels reordered for blocks" in reports[0]
    assert "channels reordered" not in reports[1]


class Dead(nn.Module):
    """Hidden channels that are never more than zero, and beside them a layer of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.nothing = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 12)
        self.first.weight.data[:8], self.first.bias.data[:8] = 0, -1
        self.nothing.weight.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.relu(self.first(x))) + self.nothing(x)
        return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("examples", [5, 64])
def test_dead_channels_and_empty_layers_do_no_harm(name: str, examples: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    x[:, 3] = 0
    graph = capture(Dead().eval(), (x[:4],), dynamic={0: {0: "batch"}})
    small = regauge.optimize(graph, f"factorize{{params=0.8,form={name}}}", data=[x[:examples]])
    (wanted,), (found,) = graph.run(x), small.run(x)
    assert torch.isfinite(found).all()
    if examples == len(x):
        assert float((found - wanted).norm() / (wanted - wanted.mean(0)).norm()) < 1.0
