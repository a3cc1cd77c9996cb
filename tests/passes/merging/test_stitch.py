"""Stitching: nothing is lost between equal networks, and least squares between others; the parts stay readable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regauge
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph, Node


def layered(width: int, blocks: int, batch: str) -> Graph:
    layers = [nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True) for _ in range(blocks)]
    model = nn.Sequential(nn.Linear(5, width), *layers, nn.Linear(width, 4))
    return regauge.capture(model.double().eval(), (torch.randn(2, 6, 5).double(),), dynamic={0: {0: batch}})


def convolutional(width: int) -> Graph:
    layers = [nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3, 2), nn.ReLU(), nn.Conv2d(width, width, 3)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)).double().eval()
    return regauge.capture(model, (torch.randn(2, 3, 12, 12).double(),), dynamic={0: {0: "batch"}})


def value_of(graph: Graph, name: str, x: torch.Tensor) -> torch.Tensor:
    found = []

    def keep(node: Node, results: tuple[torch.Tensor, ...]) -> None:
        found.extend(results if node.name == name else ())

    graph.run(x, hook=keep)
    return found[0]


def test_a_network_stitched_to_itself_is_itself() -> None:
    x = torch.randn(40, 6, 5, dtype=torch.float64)
    graph = layered(16, 2, "batch")
    stitched = regauge.stitch(graph, graph, ("layer_norm_1", "layer_norm_1"), [x])
    assert (stitched.run(x)[0] - graph.run(x)[0]).abs().max() < 1e-8
    assert (stitched.to_torch()(x) - graph.run(x)[0]).abs().max() < 1e-8


@pytest.mark.parametrize("kind", ["tokens", "images"])
def test_networks_of_other_widths_are_joined_by_least_squares(kind: str) -> None:
    if kind == "tokens":
        front, back, at = layered(16, 2, "batch"), layered(24, 3, "n"), "layer_norm_1"
        x = torch.randn(64, 6, 5, dtype=torch.float64)
    else:
        front, back, at = convolutional(8), convolutional(12), "relu_1"
        x = torch.randn(64, 3, 12, 12, dtype=torch.float64)
    stitched = regauge.stitch(front, back, (at, at), list(x.split(16)))
    module = stitched.to_torch()
    assert isinstance(module.stitch, nn.Linear if kind == "tokens" else nn.Conv2d)
    assert {name.partition(".")[0] for name, _ in module.named_parameters()} == {"front", "stitch", "back"}
    assert (module(x[:5]) - stitched.run(x[:5])[0]).abs().max() < 1e-12
    axis = 2 if kind == "tokens" else 1
    given, wanted = (value_of(graph, at, x).movedim(axis, -1).flatten(0, -2) for graph in (front, back))
    ones = torch.cat([given, given.new_ones(len(given), 1)], 1)
    best = torch.linalg.lstsq(ones, wanted, driver="gelsd").solution
    weight, bias = (stitched.parameters[f"stitch.{name}"].tensor for name in ("weight", "bias"))
    found = ones @ torch.cat([weight.flatten(1), bias[:, None]], 1).t()
    plain = given @ torch.linalg.pinv(given) @ wanted
    left, least, without = (float((y - wanted).square().sum()) for y in (found, ones @ best, plain))
    assert left < least * (1 + 1e-6)
    assert left < without  # the intercept is worth something


def test_what_cannot_be_joined_is_told() -> None:
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    with pytest.raises(GraphError, match="cannot be joined: they have other axes"):
        regauge.stitch(layered(16, 1, "batch"), convolutional(8), ("layer_norm_1", "relu_1"), [x])
    with pytest.raises(GraphError, match="is not computed in graph"):
        regauge.stitch(layered(16, 1, "batch"), layered(16, 1, "batch"), ("input", "layer_norm_1"), [x])
