"""Activations are put together in every order and spelling, and only where they are what they look like."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn, randn

import regauge
from assembling import WAYS, assembled, counts, exported
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.ir.rewriting.rewrite import rewrite_graph
from regauge.ir.running.interpret import run
from regauge.passes.simplify.assemble_activations import RULES


class Between(nn.Module):
    """A function written by hand between two linear layers."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(6, 8), nn.Linear(8, 6), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.function(self.first(x)))


C = math.sqrt(2 / math.pi)
SPELLINGS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))),
    ("gelu", lambda x: 0.5 * (x * (1.0 + torch.erf(x * 0.7071067811865476)))),
    ("gelu", lambda x: (torch.erf(x / math.sqrt(2)) + 1) / 2 * x),
    ("gelu", lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0))))),
    ("gelu", lambda x: x * 0.5 * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))),
    ("silu", lambda x: x * torch.sigmoid(x)),
    ("silu", lambda x: x / (1 + torch.exp(-x))),
    ("mish", lambda x: x * torch.tanh(F.softplus(x))),
    ("hardswish", lambda x: x * F.relu6(x + 3) / 6),
    ("hardswish", lambda x: x * (F.relu6(x + 3.0) / 6.0)),
    ("hardswish", lambda x: x * (torch.clamp(x + 3.0, 0, 6) * (1 / 6))),
    ("hardsigmoid", lambda x: F.relu6(x + 3) / 6),
    ("leaky_relu", lambda x: torch.max(x, 0.2 * x)),
    ("leaky_relu", lambda x: torch.where(x > 0, x, x * 0.1)),
    ("softplus", lambda x: torch.log(1 + torch.exp(x))),
    ("softplus", lambda x: torch.where(x > 10, x, torch.log1p(torch.exp(x)))),
    ("softmax", lambda x: (e := torch.exp(x - x.max(-1, keepdim=True)[0])) / e.sum(-1, keepdim=True)),
    ("softmax", lambda x: torch.exp(x) / torch.exp(x).sum(1, keepdim=True)),
    ("log_softmax", lambda x: x - torch.logsumexp(x, -1, keepdim=True)),
    ("relu", lambda x: torch.clamp(x, min=0)),
]


@pytest.mark.parametrize(("op", "function"), SPELLINGS)
def test_spellings_in_torch_modules(op: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module, x = Between(function).eval(), randn(4, 6)
    graph = regauge.capture(module, (x,))
    result = assembled(graph, (x,))
    assert [node.op for node in result.nodes] == ["linear", op, "linear"]
    emitted = result.to_torch()
    assert set(emitted.state_dict()) == set(module.state_dict())
    torch.testing.assert_close(emitted(x), module(x), rtol=1e-5, atol=1e-5)


class Activations(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tanh = F.gelu(x, approximate="tanh")
        return F.gelu(x), tanh, F.silu(x), F.mish(x), F.hardswish(x), F.hardsigmoid(x), F.softplus(x), F.leaky_relu(x)


@pytest.mark.parametrize("way", WAYS)
def test_activations_of_exporters(way: str, tmp_path: Path) -> None:
    x = randn(3, 5) * 3
    graph = exported(Activations(), (x,), way, tmp_path)
    result = assembled(graph, (x,))
    wanted = {"gelu": 2, "silu": 1, "mish": 1, "hardswish": 1, "hardsigmoid": 1, "softplus": 1, "leaky_relu": 1}
    assert counts(result) == wanted
    assert len(graph) > len(result)


def of(write: Callable[[Builder, Value], Any], dtype: torch.dtype = torch.float32) -> Graph:
    graph = Graph()
    build = Builder(graph)
    graph.outputs = [write(build, build.input("x", (3, 4), dtype))]
    return graph


def _shifted(build: Builder, x: Value) -> Any:
    return build.sub(x, build.amax(x, dims=(1,), keepdim=True))


NEAR_MISSES: list[tuple[str, Callable[[Builder, Value], Any]]] = [
    ("gelu", lambda b, x: b.mul(b.mul(x, 0.5), b.add(b.erf(b.div(x, 1.5)), 1))),
    ("gelu", lambda b, x: b.mul(b.mul(x, 0.4), b.add(b.erf(b.div(x, math.sqrt(2))), 1))),
    ("gelu", lambda b, x: b.mul(b.mul(b.relu(x), 0.5), b.add(b.erf(b.div(x, math.sqrt(2))), 1))),
    ("silu", lambda b, x: b.mul(x, b.sigmoid(b.mul(x, 1.702)))),
    ("silu", lambda b, x: b.mul(b.relu(x), b.sigmoid(x))),
    ("mish", lambda b, x: b.mul(x, b.tanh(b.softplus(x, beta=2.0)))),
    ("hardswish", lambda b, x: b.div(b.mul(x, b.clamp(b.add(x, 3), 0.0, 5.0)), 6)),
    ("hardsigmoid", lambda b, x: b.clamp(b.add(b.mul(x, 0.2), 0.5), 0.0, 1.0)),
    ("leaky_relu", lambda b, x: b.maximum(x, b.mul(x, 2.0))),
    ("leaky_relu", lambda b, x: b.maximum(x, b.mul(x, 0.0))),
    ("leaky_relu", lambda b, x: b.where(b.gt(x, 1), x, b.mul(x, 0.1))),
    ("softmax", lambda b, x: b.div(b.exp(x), b.sum(b.exp(x), dims=None, keepdim=True))),
    ("softmax", lambda b, x: b.div(b.exp(_shifted(b, x)), b.sum(b.exp(x), dims=(1,), keepdim=True))),
    ("softmax", lambda b, x: b.div(b.exp(x), b.sum(b.exp(b.relu(x)), dims=(1,), keepdim=True))),
    ("clamp", lambda b, x: b.maximum(x, b.amax(x, dims=(1,), keepdim=True))),
    ("clamp", lambda b, x: b.maximum(x, b.constant(torch.randn(4)))),
]  # fmt: skip


@pytest.mark.parametrize(("op", "write"), NEAR_MISSES)
def test_near_misses_stay(op: str, write: Callable[[Builder, Value], Any]) -> None:
    assert op not in counts(assembled(of(write), (randn(3, 4),)))


def test_clamps_that_cross_stay() -> None:
    """No one clamp has a least bound above its largest; that they give one number is for other rules to say."""
    graph = of(lambda b, x: b.clamp(b.clamp(x, None, -1.0), 1.0))
    log = rewrite_graph(graph.copy(), RULES)
    assert not log.total and log.misses["clamp-twice"].reason == "its bounds are computed, or cross"
    assert [node.inputs[1:] for node in assembled(graph, (randn(3, 4),)).nodes] == [(1.0, 1.0)]


def test_constants_that_widen_the_result_stay() -> None:
    """A product with a constant of more axes has more axes: nothing is lost of them."""
    graph = of(lambda b, x: b.mul(b.mul(x, b.sigmoid(x)), b.constant(torch.ones(1, 1, 1))))
    assert graph.outputs[0].rank == 3  # type: ignore[union-attr]
    wide = of(lambda b, x: b.maximum(x, b.constant(torch.full((1, 1, 1), 0.5))))
    log = rewrite_graph(wide, RULES)
    assert not log.total and "shapes and types must be the same" in log.misses["clamp-from-extremes"].reason


def test_integers_stay() -> None:
    graph = of(lambda b, x: b.maximum(x, b.constant(torch.tensor(2))), torch.int64)
    assert counts(assembled(graph, (torch.arange(12).reshape(3, 4),))) == {"maximum": 1}


def test_overflow_is_what_the_formula_says() -> None:
    graph = of(lambda b, x: b.log(b.add(b.exp(x), 1)))
    result = regauge.optimize(graph, "simplify")
    assert run(result, [torch.full((3, 4), 200.0)])[0].eq(200.0).all()
