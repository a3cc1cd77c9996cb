"""Links that take no less time than their layer are refused or told, by a made-up clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from regauge.frontends.capture import capture
from regauge.ir.cost import figures
from regauge.ir.graph import Graph
from regauge.ir.timing import Timing
from regauge.passes.base import Context
from regauge.passes.factorization.factorize import Factorize


def clock(graphs: Sequence[Graph], inputs: Any) -> list[Timing]:
    """A start of a millisecond for each convolution, and a millisecond for 50 thousand multiplications."""
    assert inputs is None
    for graph in graphs:
        graph.run(torch.randn([int(size) for size in graph.inputs[0].shape]))
    return [Timing(sum(n.op == "conv" for n in g.nodes) + figures(g).macs / 5e4, 0.01, "made up") for g in graphs]


def network() -> Graph:
    """A wide convolution, whose links pay, between two that are too small for that."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1)]
    return capture(nn.Sequential(*layers).eval(), (torch.randn(1, 8, 12, 12),))


def names(graph: Graph) -> set[str]:
    return {parameter.name for parameter in graph.all_parameters()}


def test_refused_links_leave_their_layers_whole() -> None:
    graph, context = network(), Context(measure=clock)
    small = Factorize(rank=0.5, gate="refuse").call(graph, context)
    assert [node.op for node in small.nodes].count("conv") > 3
    assert {"0.weight", "4.weight"} <= names(small)
    assert "2.weight" not in names(small)
    assert any("0.weight: " in note and "takes no less time" in note for note in context.notes)
    assert context.left["it is worth more whole"] == 2


def test_warned_links_stay() -> None:
    graph, context = network(), Context(measure=clock)
    small = Factorize(rank=0.5, gate="warn").call(graph, context)
    assert "0.weight" not in names(small)
    assert any("0.weight: " in note for note in context.notes)


@pytest.mark.parametrize("gate", ["off", "warn"])
def test_nothing_is_measured_where_nothing_can_or_is_asked(gate: Any) -> None:
    context = Context(measure=clock if gate == "off" else None)
    Factorize(rank=0.5, gate=gate).call(network(), context)
    assert ("not measured" in " ".join(context.notes)) == (gate == "warn")
