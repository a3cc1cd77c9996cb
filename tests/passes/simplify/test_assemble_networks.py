"""Whole networks through every exporter: the same operators are found, the results and the free sizes stay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

import regauge
from assembled_networks import NETWORKS
from assembling import WAYS, assembled, counts, exported
from regauge.ir.graph import Graph

PRIMITIVE = ("softmax", "erf", "tanh", "sigmoid", "exp", "sqrt", "rsqrt", "pow", "reciprocal")


def lost(before: Graph, after: Graph) -> Counter[int]:
    """Sizes of free Dims that are no longer there; whole operators may well free others."""
    sizes = (Counter(group.size for group in graph.groups() if group.free) for graph in (before, after))
    return next(sizes) - next(sizes)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_captured_from_torch(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]
    module, inputs = network.make().eval(), network.inputs()
    graph = regauge.capture(module, inputs)
    result = assembled(graph, inputs)
    assert counts(result, *network.parts) == network.parts
    assert counts(result, *PRIMITIVE) == dict.fromkeys(PRIMITIVE, 0)
    assert not lost(graph, result)
    emitted = result.to_torch()
    assert set(emitted.state_dict()) == set(module.state_dict()) - network.gone
    torch.testing.assert_close(emitted(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)


# All four ways take long; the two that differ most are tested always.
EACH = [pytest.param(way, marks=() if way in ("dynamo", "script17") else pytest.mark.sweep) for way in WAYS]


@pytest.mark.parametrize("way", EACH)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_exporters(name: str, way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]
    inputs = network.inputs()
    graph = exported(network.make(), inputs, way, tmp_path)
    result = assembled(graph, inputs)
    assert counts(result, *network.parts) == network.parts
    assert counts(result, *PRIMITIVE) == dict.fromkeys(PRIMITIVE, 0)
    assert not lost(graph, result)
