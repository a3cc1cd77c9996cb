"""``distil``: what is left of a network comes nearer to what it was, on data it did not see; what stays as it is."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.fusing.distil import Distil
from small_graphs import residual_network


def network() -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    return capture(model, (torch.randn(2, 16),), dynamic={0: {0: "batch"}})


def rows(batches: int = 6, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, 16, generator=generator) for _ in range(batches)]


def error(graph: Graph, other: Graph, x: torch.Tensor) -> float:
    (y,), (z,) = graph.run(x), other.run(x)
    return float((y - z).square().sum() / y.square().sum())


def test_a_pruned_network_learns_what_it_was() -> None:
    """Of a grown network, so that one of the size that is left computes the same."""
    graph, (x,) = regauge.optimize(network(), "grow"), rows(1, seed=9)
    cut = "prune{ratio=0.5,score=l2,compensate=false}"
    small = regauge.optimize(graph, cut, data=rows())
    trained = regauge.optimize(graph, f"{cut},distil{{steps=200,rate=0.02}}", data=rows())
    assert error(graph, trained, x) < 0.5 * error(graph, small, x)
    assert [own.shape for own in trained.all_parameters()] == [own.shape for own in small.all_parameters()]
    (note,) = trained.report.passes[-1].notes
    assert note.startswith("weights trained on 320 examples: 6")
    assert "on the last batch the error of the outputs went from" in note


def test_what_is_compared_are_blocks_and_else_layers_of_the_same_sizes() -> None:
    teacher = network()
    ends = Distil()._ends(teacher, regauge.optimize(teacher, "factorize{rank=4}"))
    assert [value.name for value in ends.before[1:]] == [value.name for value in ends.after[1:]] == ["relu", "relu_1"]
    assert ends.shares == [1.0, 0.5, 0.5] and ends.outputs == 1
    residual = residual_network()
    ends = Distil(inner=0.5)._ends(residual, residual.copy())
    assert [value.producer.op for value in ends.before if value.producer is not None] == ["linear", "add", "add"]
    assert ends.shares == [1.0, 0.25, 0.25]
    assert len(Distil(inner=0)._ends(residual, residual.copy()).before) == 1


def test_zeros_stay_and_so_does_what_is_excluded() -> None:
    graph = network()
    sparse = regauge.optimize(graph, "sparsify{method=magnitude,refine=off,update=off}", data=rows())
    trained = regauge.optimize(
        graph, "sparsify{method=magnitude,refine=off,update=off},distil{steps=50,exclude=[0.bias]}", data=rows()
    )
    for name, own in sparse.parameters.items():
        after = trained.parameters[name].tensor
        assert torch.equal(after, own.tensor) == (name == "0.bias")
        assert not own.tensor.dim() == 2 or torch.equal(after == 0, own.tensor == 0)


def test_weights_that_come_no_nearer_are_not_kept() -> None:
    graph = network()
    found = regauge.optimize(graph, "factorize{rank=8},distil{steps=3,rate=100}", data=rows())
    assert found.report.passes[-1].notes[0].startswith("weights stay as they were: on the last batch the error of the")
    assert not found.report.passes[-1].changed


def test_outputs_alone_judge() -> None:
    """The last layer was fitted to what the hidden ones lost: as these come nearer, outputs are further off."""
    step = "factorize{rank=4},distil{steps=30,inner=300,rate=0.03,exclude=[4.*]}"
    found = regauge.optimize(network(), step, data=rows())
    (note,) = found.report.passes[-1].notes
    assert note.startswith("weights stay as they were: on the last batch the error of the outputs went from")
    before, after = map(float, re.findall(r"of what is inside from (\S+) to (\S+)", note)[0])
    assert after < before and not found.report.passes[-1].changed


def test_of_one_batch_it_says_that_it_learned_from_it() -> None:
    found = regauge.optimize(network(), "factorize{rank=8},distil{steps=2}", data=rows(1))
    assert "on the batch that it learned from the error of the outputs went" in found.report.passes[-1].notes[0]


def test_what_it_cannot_learn_from_is_said() -> None:
    graph = network()
    alone = regauge.optimize(graph, "distil", data=rows())
    assert alone.report.passes[0].notes == ("no pass in front of it changed the network: there is nothing to learn",)
    with pytest.raises(PassError, match="distil needs data"):
        regauge.optimize(graph, "factorize{rank=8},distil")
    with pytest.raises(PassError, match="matches no parameter"):
        regauge.optimize(graph, "factorize{rank=8},distil{include=[head.*]}", data=rows())
