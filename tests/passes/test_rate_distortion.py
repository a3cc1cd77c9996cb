"""Losses measured for each Dim alone, and counts chosen by them (``scope=dp``)."""

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from regauge.ir.cost import figures
from regauge.ir.graph import Graph
from regauge.passes.allocation.choices import Choice
from regauge.passes.pruning.rate_distortion import measured_curves
from regauge.passes.pruning.selection import best


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network() -> Graph:
    """A wide layer of which half does nothing, and a narrow one that matters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[12:] *= 1e-2
        model[0].bias[12:] = 0
    return regauge.capture(model.eval(), (images(2),), dynamic={0: {0: "batch"}})


def choices(graph: Graph) -> list[Choice]:
    """Scores by which the first indices are the best."""
    dims = [group.dim for group in graph.groups() if group.free]
    return [Choice(dim, np.arange(int(dim.size), 0, -1.0)) for dim in dims]


def test_the_loss_is_the_squared_change_of_the_outputs_per_example() -> None:
    graph, x = network(), images(40)
    own = choices(graph)
    scores = {choice.dim: choice.scores for choice in own}
    curves = measured_curves(graph, own, scores, [(x,)], refit=False)
    for choice in own:
        curve = curves[choice.dim]
        assert curve.counts[0] == 1 and curve.counts[-1] == choice.size and curve.losses[-1] == 0
        assert (np.diff(curve.losses) <= 0).all()
        small = regauge.resize(graph, {choice.dim: best(choice.scores, int(curve.counts[0]))})
        expected = float((small.run(x)[0] - graph.run(x)[0]).double().square().sum()) / 40
        assert curve.losses[0] == pytest.approx(expected)
    assert curves[own[0].dim].loss(12) < 0.01 * curves[own[0].dim].loss(6), "the other half does nothing"


def test_less_is_lost_where_layers_are_refitted() -> None:
    graph, x = network(), images(60)
    own = choices(graph)
    scores = {choice.dim: choice.scores for choice in own}
    plain, refitted = (measured_curves(graph, own, scores, [(x,)], refit=refit) for refit in (False, True))
    for choice in own:
        assert (refitted[choice.dim].losses[:-1] < plain[choice.dim].losses[:-1]).all()


def test_the_budget_is_met_by_what_costs_least() -> None:
    graph, batches = network(), [(images(48, seed),) for seed in (1, 2)]
    small = regauge.optimize(graph, "prune{macs=0.5,scope=dp,compensate=false}", data=batches)
    assert figures(small).macs <= 0.5 * figures(graph).macs
    cuts = {cut.dim: cut.after for cut in small.report.passes[0].cuts}
    assert cuts == {"0.weight:0": 11}, "12 would cost 20 MACs too many, and all of the narrow layer matters"


def test_layers_can_be_weighed_by_measured_losses_whatever_the_scores() -> None:
    small = regauge.optimize(network(), "prune{macs=0.6,params=0.7,scope=dp,score=l2}", data=[(images(32),)])
    assert "layers refitted" in str(small.report)


def test_data_is_made_up_where_there_is_none() -> None:
    small = regauge.optimize(network(), "prune{macs=0.5,scope=dp,examples=8,steps=1}")
    assert "inputs are made up" in str(small.report) and figures(small).macs <= 0.5 * figures(network()).macs
