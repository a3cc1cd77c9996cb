"""Factors without data: biases take back the mean of what they change, where batch norms tell it, and else stay."""

from __future__ import annotations

import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph


def network(*, bias: bool) -> tuple[Graph, torch.Tensor]:
    """Two convolutions, batch norms with the statistics of the images that come with it; the bias is in the last conv
    or in the norm behind it."""
    torch.manual_seed(0)
    last: list[nn.Module] = [] if bias else [nn.BatchNorm2d(12)]
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3, bias=bias), *last]
    model, images = nn.Sequential(*layers), torch.randn(64, 3, 10, 10)
    for norm in (layers[1], *last):
        assert isinstance(norm, nn.BatchNorm2d)
        norm.momentum = None  # the mean over all that it sees
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.5, 0.3)
    model.train()(images)
    return capture(model.eval(), (images[:2],), dynamic={0: {0: "batch"}}), images


def mean(graph: Graph, images: torch.Tensor) -> torch.Tensor:
    (found,) = graph.run(images)
    return found.mean((0, 2, 3))


def test_the_mean_of_what_a_layer_gives_stays() -> None:
    for bias, taker in ((True, "3.up.bias"), (False, "4.running_mean")):
        graph, images = network(bias=bias)
        found = regauge.optimize(graph, "factorize{rank=4,include=[3.weight],form=low-rank}")
        assert found.report.passes[0].notes == ("1 of 1 biases corrected by what batch norms hold",)
        whole = mean(graph, images)
        corrected = (mean(found, images) - whole).norm()
        own, before = found.parameters[taker], graph.parameters["3.bias" if bias else taker]
        set_weight(found, own, before.tensor, by="test")
        assert corrected < 0.1 * (mean(found, images) - whole).norm()


def test_biases_stay_where_nothing_is_known() -> None:
    graph, _ = network(bias=True)
    found = regauge.optimize(graph, "factorize{rank=2,include=[0.weight]}")
    assert found.report.passes[0].notes == ()
    assert torch.equal(found.parameters["0.up.bias"].tensor, graph.parameters["0.bias"].tensor)
