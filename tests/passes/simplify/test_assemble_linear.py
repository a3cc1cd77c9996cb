"""Linear layers are found under products with weights, stored either way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn, randn

import regauge
from assembling import WAYS, assembled, counts, exported
from regauge.ir.rewriting.rewrite import rewrite_graph
from regauge.passes.simplify.assemble_linear import RULES


class Stored(nn.Module):
    """Two layers whose weights are stored (in, out) and (out, in), without the operator that multiplies by them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(randn(6, 8)), nn.Parameter(randn(4, 8))
        self.bias = nn.Parameter(randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.first + self.bias) @ self.second.t()


def test_weights_of_torch_modules_keep_their_names() -> None:
    module, x = Stored().eval(), randn(2, 3, 6)
    graph = regauge.capture(module, (x,))
    result = assembled(graph, (x,))
    assert [node.op for node in result.nodes] == ["linear", "relu", "linear"]
    shapes = {name: tuple(p.tensor.shape) for name, p in result.parameters.items()}
    assert shapes == {"first": (8, 6), "second": (4, 8), "bias": (8,)}
    emitted = result.to_torch()
    assert set(emitted.state_dict()) == set(module.state_dict())
    torch.testing.assert_close(emitted(x), module(x))
    sizes = [sorted(group.size for group in g.groups() if group.free) for g in (graph, result)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("way", WAYS)
def test_layers_of_exporters(way: str, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False), nn.Tanh(), nn.Linear(4, 4))
    for x in (randn(2, 6), randn(2, 3, 6)):
        result = assembled(exported(module, (x,), way, tmp_path), (x,))
        assert counts(result) == {"linear": 3, "relu": 1, "tanh": 1}


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.w, self.row = kind, nn.Parameter(randn(4, 4)), nn.Parameter(randn(3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "read twice":
            return x @ self.w + self.w[:3]
        if self.kind == "computed":
            return x @ (x.t() @ x)
        return nn.functional.linear(x, self.w) + self.row


@pytest.mark.parametrize(
    ("kind", "rule", "reason"),
    [
        ("read twice", "linear-of-matrix", "its weight w has other readers"),
        ("computed", "linear-of-matrix", "is no matrix of weights"),
        ("other axis", "bias-into-linear", "does not run along its outputs alone"),
    ],
)
def test_what_is_no_layer(kind: str, rule: str, reason: str) -> None:
    x = randn(3, 4)
    graph = regauge.capture(Odd(kind).eval(), (x,))
    assert len(assembled(graph, (x,))) == len(graph)
    assert reason in rewrite_graph(graph.copy(), RULES).misses[rule].reason
