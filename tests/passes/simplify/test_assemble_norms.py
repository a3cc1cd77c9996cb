"""Norms are put together whoever wrote them down, and only where they are norms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
import torch
from torch import nn, randn

import regauge
from assembling import WAYS, assembled, counts, exported
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.ir.rewriting.rewrite import rewrite_graph
from regauge.passes.simplify.assemble_norms import RULES
from regauge.passes.simplify.simplify import Simplify


class Spelled(nn.Module):
    """A norm written by hand between two linear layers."""

    def __init__(self, width: int, norm: Callable[..., torch.Tensor], *, shift: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.shift = nn.Parameter(randn(width)) if shift else None
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.first(x)) * self.gain
        return self.second(y if self.shift is None else y + self.shift)


def bert(x: torch.Tensor) -> torch.Tensor:
    u = x.mean(-1, keepdim=True)
    s = (x - u).pow(2).mean(-1, keepdim=True)
    return (x - u) / torch.sqrt(s + 1e-12)


def by_variance(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(dim=-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)


def by_products(x: torch.Tensor) -> torch.Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c * ((c * c).mean(-1, keepdim=True) + 1e-5) ** -0.5


def rms(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rms_by_division(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("norm", [bert, by_variance, by_products])
def test_layer_norms_of_torch_modules(norm: Callable[..., torch.Tensor]) -> None:
    module, x = Spelled(8, norm).eval(), randn(2, 5, 8)
    result = assembled(regauge.capture(module, (x,)), (x,))
    assert [node.op for node in result.nodes] == ["linear", "layer_norm", "linear"]
    emitted = result.to_torch()
    assert set(emitted.state_dict()) == set(module.state_dict())
    torch.testing.assert_close(emitted(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [rms, rms_by_division])
def test_rms_norms_of_torch_modules(norm: Callable[..., torch.Tensor]) -> None:
    module, x = Spelled(8, norm, shift=False).eval(), randn(2, 5, 8)
    graph = regauge.capture(module, (x,))
    result = assembled(graph, (x,))
    assert [node.op for node in result.nodes] == ["linear", "rms_norm", "linear"]
    assert set(result.to_torch().state_dict()) == set(module.state_dict())
    assert free(result) == free(graph)


def free(graph: Graph) -> list[int]:
    return sorted(group.size for group in graph.groups() if group.free)


class Gemma(nn.Module):
    """Gains are stored as their distance from one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).type_as(x)


def test_gains_stored_as_their_distance_from_one() -> None:
    module, x = Gemma().eval(), randn(2, 8)
    result = assembled(regauge.capture(module, (x,)), (x,), tolerance=0)
    assert [node.op for node in result.nodes] == ["rms_norm"]
    assert torch.equal(result.parameters["weight"].tensor, (1 + module.weight).detach())


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.group, self.instance = nn.LayerNorm(6), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        self.conv = nn.Conv2d(3, 4, 3)
        self.gain = nn.Parameter(randn(6))
        for norm in (self.layer, self.group, self.instance):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.instance(self.group(self.conv(x)))
        return rms(self.layer(y)) * self.gain


@pytest.mark.parametrize("way", WAYS)
def test_norms_of_exporters(way: str, tmp_path: Path) -> None:
    module, x = Norms().eval(), randn(2, 3, 6, 8)
    graph = exported(module, (x,), way, tmp_path)
    result = assembled(graph, (x,))
    ops = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "mul", "add", "reshape")
    assert counts(result, *ops) == dict.fromkeys(ops[:4], 1) | dict.fromkeys(ops[4:], 0)
    assert free(result) == free(graph)


def test_graphs_loaded_from_onnx_are_left_as_they_are_spelled(tmp_path: Path) -> None:
    graph = exported(Norms(), (randn(2, 3, 6, 8),), "script13", tmp_path)
    spelled = counts(graph, "sqrt", "pow")
    assert counts(regauge.optimize(graph, "simplify"), "sqrt", "pow") == spelled == {"sqrt": 2, "pow": 2}
    assert counts(regauge.optimize(graph, "simplify{assemble=always}"), "sqrt", "pow") == {"sqrt": 0, "pow": 0}
    assert counts(regauge.optimize(graph, "simplify{only=assemble-norms}"), "sqrt", "pow") == {"sqrt": 0, "pow": 0}
    never = "simplify{only=assemble-norms, assemble=never}"
    assert counts(regauge.optimize(graph, never), "sqrt", "pow") == spelled


def test_torch_graphs_may_be_left_too() -> None:
    graph = regauge.capture(Spelled(8, bert).eval(), (randn(2, 8),))
    left = regauge.optimize(graph, [Simplify(assemble="never")])
    assert counts(left, "layer_norm", "sqrt") == {"layer_norm": 0, "sqrt": 1}


def spelled(x_shape: tuple[int, ...], write: Callable[[Builder, Value], Any]) -> Graph:
    graph = Graph()
    build = Builder(graph)
    graph.outputs = [write(build, build.input("x", x_shape, torch.float32))]
    return graph


def _layer(build: Builder, x: Value, *, dims: tuple[int, ...] = (-1,), correction: int = 0, eps: Any = 1e-5) -> Value:
    centred = build.sub(x, build.mean(x, dims=dims, keepdim=True))
    spread = build.add(build.var(x, dims=dims, correction=correction, keepdim=True), eps)
    return build.div(centred, build.sqrt(spread))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (
            lambda b, x: _layer(b, x, dims=(1,)),
            "it averages over the axes [1] of 3: only the last ones make a whole op",
        ),
        (lambda b, x: _layer(b, x, eps=b.sum(x, dims=None)), "its eps is computed"),
        (lambda b, x: _layer(b, x, correction=1), "var: mean is expected"),
    ],
)
def test_what_is_no_layer_norm(write: Callable[..., Value], reason: str) -> None:
    graph = spelled((2, 4, 6), write)
    result = regauge.optimize(graph, [Simplify(assemble="always")])
    assert len(result) == len(graph) and "layer_norm" not in counts(result)
    assert reason in str(rewrite_graph(graph.copy(), RULES).misses["layer-norm-from-means"])


def test_a_mean_of_something_else_is_no_norm() -> None:
    def other(build: Builder, x: Value) -> Value:
        y = build.relu(x)
        centred = build.sub(x, build.mean(y, dims=(-1,), keepdim=True))
        return build.div(centred, build.sqrt(build.add(build.var(x, dims=(-1,), correction=0, keepdim=True), 1e-5)))  # type: ignore[no-any-return]

    assert "layer_norm" not in counts(assembled(spelled((2, 4), other), (randn(2, 4),)))


def test_results_that_are_read_elsewhere_stay() -> None:
    graph = spelled((2, 4), lambda b, x: _layer(b, x))
    graph.outputs.append(next(node.output for node in graph.nodes if node.op == "var"))
    assert "layer_norm" not in counts(assembled(graph, (randn(2, 4),)))


def test_gains_that_run_elsewhere_stay() -> None:
    def scaled(*shape: int) -> Graph:
        return spelled(
            (2, 6, 6),
            lambda b, x: b.mul(b.layer_norm(x, normalized_shape=(6,)), b.parameter("g", randn(*shape))),
        )

    for shape in ((6, 1), (1,), (2, 1, 6)):
        assert counts(assembled(scaled(*shape), (randn(2, 6, 6),)), "mul") == {"mul": 1}
    assert counts(assembled(scaled(1, 6), (randn(2, 6, 6),)), "mul") == {"mul": 0}


def test_rows_that_cut_across_channels_are_no_groups() -> None:
    def rows(build: Builder, x: Value) -> Value:
        y = build.instance_norm(build.reshape(x, shape=(2, 4, 12)))
        return build.reshape(y, shape=(2, 6, 2, 4))  # type: ignore[no-any-return]

    assert "group_norm" not in counts(assembled(spelled((2, 6, 2, 4), rows), (randn(2, 6, 2, 4),)))


def _keras_norm(divisor: float) -> Graph:
    """Two linear layers around a layer norm as tf2onnx writes that of Keras: rows are channels of an only image."""
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    network (float[N, 4] x) => (float[N, 3] y) {{
      one = Constant <value = float[1] {{1.0}}> ()
      zero = Constant <value = float[1] {{0.0}}> ()
      n = Constant <value = float {{{divisor}}}> ()
      to = Constant <value = int64[4] {{1, -1, 6, 1}}> ()
      back = Constant <value = int64[2] {{-1, 6}}> ()
      axes = Constant <value = int64[3] {{0, 2, 3}}> ()
      h = MatMul (x, first)
      shape = Shape <start = 0, end = 1> (h)
      ones = Expand (one, shape)
      zeros = Expand (zero, shape)
      rows = Reshape (h, to)
      mean = ReduceMean <axes = [0, 2, 3], keepdims = 1> (rows)
      centred = Sub (rows, mean)
      squares = ReduceSumSquare <axes = [0, 2, 3], keepdims = 0> (centred)
      variance = Div (squares, n)
      means = Squeeze (mean, axes)
      normed = BatchNormalization <epsilon = 0.001> (rows, ones, zeros, means, variance)
      flat = Reshape (normed, back)
      scaled = Mul (flat, gain)
      shifted = Add (scaled, shift)
      y = MatMul (shifted, second)
    }}
    """
    model = onnx.parser.parse_model(text)
    for name, shape in {"first": (4, 6), "gain": (6,), "shift": (6,), "second": (6, 3)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(randn(shape).numpy(), name))
    return regauge.load(model)


def test_a_layer_norm_written_as_a_batch_norm_of_rows_by_sums() -> None:
    graph, x = _keras_norm(6.0), (randn(5, 4),)
    result = assembled(graph, x)
    assert [node.op for node in result.nodes] == ["linear", "layer_norm", "linear"]
    assert (free(graph), free(result)) == ([], [6])
    small = regauge.optimize(result, "prune{ratio=0.5,score=l2}")
    assert {node.op: node.output.shape[1] for node in small.nodes[:2]} == {"linear": 3, "layer_norm": 3}


def test_a_sum_over_another_number_is_no_mean() -> None:
    assert counts(assembled(_keras_norm(5.0), (randn(5, 4),)), "layer_norm", "sum") == {"layer_norm": 0, "sum": 1}


def test_an_eps_that_a_kept_operator_draws_is_no_number() -> None:
    """RandomNormal of ONNX has no record here or is run as it is: what it gives is not known before it runs."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    network (float[2, 4] x) => (float[2, 4] y) {
      eps = RandomUniform <shape = [1], low = 0.1, high = 0.2> ()
      two = Constant <value = float {2.0}> ()
      axes = Constant <value = int64[1] {1}> ()
      squares = Pow (x, two)
      mean = ReduceMean <axes = [1], keepdims = 1> (squares)
      sum = Add (mean, eps)
      root = Sqrt (sum)
      y = Div (x, root)
    }
    """
    graph = regauge.load(onnx.parser.parse_model(text))
    result = regauge.optimize(graph, [Simplify(assemble="always")])
    assert counts(result, "rms_norm", "sqrt") == {"rms_norm": 0, "sqrt": 1}
