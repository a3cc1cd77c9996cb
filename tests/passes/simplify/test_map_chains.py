"""Linear maps in a row, and scales and shifts in a row: what becomes one, and what stays."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import regauge
from onnx_simplified import assert_equal_runs, normal, parsed
from onnx_simplified import simplified as simplified_file
from regauge.ir.bonds import keep_bond
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.ir.rewriting.rewrite import rewrite_graph
from regauge.ir.running.interpret import run
from regauge.ir.sizes.expressions import symbol
from regauge.passes.simplify.catalog import RULE_SETS
from simplified import refusals, simplified

RULES = RULE_SETS["chains"]


class Stem(nn.Module):
    """A pointwise convolution without a bias, a padded one, a pointwise one that skips places, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 16, 1, bias=False)
        self.conv = nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 1, stride=2)
        self.wide = nn.Linear(8, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.wide(self.last(self.conv(self.mix(x))).mean((2, 3))))


def test_a_stem_of_linear_maps_is_one_convolution() -> None:
    graph = simplified(Stem(), torch.randn(2, 3, 8, 8), passes="simplify{only=chains}")
    assert [node.op for node in graph.nodes] == ["conv", "mean", "linear"]
    assert (graph.nodes[0].attributes["stride"], graph.nodes[0].attributes["padding"]) == ((2, 2), (1, 1))
    assert {k: tuple(v.shape) for k, v in graph.to_torch().state_dict().items()} == {
        "last.weight": (8, 3, 3, 3), "last.bias": (8,), "head.weight": (4, 8), "head.bias": (4,)
    }  # fmt: skip


def two_convolutions(w: tuple[int, ...], v: tuple[int, ...], *, bias: bool = False, **attributes: Any) -> Graph:
    """conv(w) -> conv(v, ``attributes``) on an image of dynamic batch."""
    graph = Graph()
    build = Builder(graph)
    batch = symbol("batch")
    graph.symbols[batch] = (1, None)
    x = build.input("x", (batch, 4, 8, 8), torch.float64)
    first, second = (build.parameter(n, torch.randn(s).double()) for n, s in (("w", w), ("v", v)))
    b = build.parameter("b", torch.randn(w[0]).double()) if bias else None
    graph.outputs = [build.conv(build.conv(x, first, b), second, **attributes)]
    return graph


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (two_convolutions((8, 4, 1, 1), (4, 8, 3, 3), bias=True, padding=1), "bias of the first one would be missing"),
        (two_convolutions((8, 4, 3, 3), (4, 8, 3, 3)), "neither of the two kernels has one entry"),
        (
            two_convolutions((2, 4, 1, 1), (8, 2, 3, 3)),
            "merged they would have 288 parameters and 10368 MACs, not 152 and 5696",
        ),
        (
            two_convolutions((4, 4, 1, 1), (4, 1, 3, 3), groups=4),
            "merged they would have 144 parameters and 5184 MACs, not 52 and 2320",
        ),
    ],
)
def test_convolutions_that_stay_two(graph: Graph, reason: str) -> None:
    assert reason in refusals(graph, RULES)


def test_narrow_linear_layers_stay_two() -> None:
    """A factorised layer is not multiplied out."""
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 16), torch.float64)
    a, b = build.parameter("a", torch.randn(2, 16).double()), build.parameter("b", torch.randn(16, 2).double())
    graph.outputs = [build.linear(build.linear(x, a), b)]
    assert "merged they would have 256 parameters and 512 MACs, not 64 and 128" in refusals(graph, RULES)


def test_sparse_matrices_stay_two() -> None:
    """Their product has half the parameters, and as many entries that are not zero as are in it; it was multiplied."""
    graph = Graph()
    build = Builder(graph)
    x, thin = build.input("x", (2, 16), torch.float64), torch.eye(16).double()
    thin[0] = thin[:, 0] = 1
    a, b = build.parameter("a", thin), build.parameter("b", thin.clone())
    graph.outputs = [build.linear(build.linear(x, a), b)]
    assert "merged their weights would have 256 entries that are not zero, not 92" in refusals(graph, RULES)


def test_a_bond_that_is_noted_stays_when_what_makes_it_is_rewritten() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 16), torch.float64)
    a, b = build.parameter("a", torch.randn(12, 16).double()), build.parameter("b", torch.randn(16, 12).double())
    down, shift = build.linear(x, a), build.parameter("shift", torch.randn(12).double())
    keep_bond(down, "a cache")
    graph.outputs = [build.linear(build.add(down, shift), b)]
    small = regauge.optimize(graph, "simplify")
    assert [node.op for node in small.nodes] == ["linear", "linear"]
    assert "narrow as it is for a cache" in str(small.report)


def test_a_middle_that_is_read_stays() -> None:
    graph = two_convolutions((8, 4, 1, 1), (4, 8, 3, 3))
    middle = graph.nodes[0].output
    graph.outputs.append(middle)
    refusals(graph, RULES)


def steps(*ops: tuple[str, Any], dtype: torch.dtype = torch.float32) -> Graph:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (4,), dtype)
    for place, (op, other) in enumerate(ops):
        given = build.parameter(f"p{place}", other) if isinstance(other, torch.Tensor) else other
        x = build(op, x, given)
    graph.outputs = [x]
    return graph


def test_many_steps_are_one() -> None:
    graph = steps(("mul", 3.0), ("div", 2), ("mul", torch.rand(4)), ("div", 4.0), ("add", 1), ("sub", 3.5))
    x = torch.arange(4.0)
    expected = run(graph, [x])
    rewrite_graph(graph, RULES)
    assert [node.op for node in graph.nodes] == ["mul", "add"] and graph.nodes[1].inputs[1] == -2.5
    assert list(graph.parameters) == ["p2"]
    torch.testing.assert_close(run(graph, [x]), expected)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (steps(("add", 12582912.0), ("sub", 12582912.0)), "so large a shift rounds"),
        (steps(("mul", 1e30), ("mul", 1e30)), "out of range"),
        (steps(("mul", 1e-30), ("mul", 1e-30)), "out of range"),
        (steps(("mul", 3), ("mul", 5), dtype=torch.int32), "not one of real numbers"),
        (steps(("mul", torch.rand(4)), ("mul", torch.rand(4).double())), "mul changes the type"),
        (steps(("mul", torch.rand(4)), ("mul", torch.rand(3, 4, 1))), "mul changes the type or the shape"),
    ],
)
def test_steps_that_stay(graph: Graph, reason: str) -> None:
    assert reason in refusals(graph, RULES)


def test_rounding_division_stays() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (4,), torch.float32)
    graph.outputs = [build.mul(build.div(x, 3.0, rounding_mode="floor"), 3.0)]
    refusals(graph, RULES)


def test_a_weight_that_two_scales_read_stays() -> None:
    graph = Graph()
    build = Builder(graph)
    x, p = build.input("x", (4,), torch.float32), build.parameter("p", torch.rand(4))
    graph.outputs = [build.mul(build.mul(x, p), 2.0), build.relu(p)]
    assert "read by others" in refusals(graph, RULES)


def inverse(function: str = "sqrt", *, read: bool = False) -> Graph:
    graph = Graph()
    build = Builder(graph)
    x, y = build.input("x", (3, 4), torch.float32), build.input("y", (3, 1), torch.float32)
    factor = build.reciprocal(build(function, y))
    graph.outputs = [build.mul(x, factor), *([factor] if read else [])]
    return graph


def test_the_inverse_of_a_root_is_a_divisor() -> None:
    graph = inverse()
    x, y = torch.randn(3, 4), torch.tensor([[0.0], [torch.inf], [2.0]])
    expected = run(graph, [x, y])
    rewrite_graph(graph, RULES)
    assert [node.op for node in graph.nodes] == ["sqrt", "div"]
    torch.testing.assert_close(run(graph, [x, y]), expected, equal_nan=True)


@pytest.mark.parametrize("graph", [inverse("exp"), inverse(read=True)], ids=["no-root", "read"])
def test_an_inverse_that_may_be_infinite_or_is_read_stays(graph: Graph) -> None:
    refusals(graph, RULES)


RMS = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[2, 3, 8] x) => (float[2, 3, 8] y) {
  s = Pow (x, two)
  m = ReduceMean <axes = [-1], keepdims = 1> (s)
  v = Add (m, eps)
  q = Sqrt (v)
  r = Reciprocal (q)
  n = Mul (x, r)
  y = Mul (gain, n)
}"""


def test_onnxruntime_knows_the_norm_that_is_left(tmp_path: Path) -> None:
    before = parsed(RMS, two=np.float32(2), eps=np.float32(1e-6), gain=normal(8))
    small = simplified_file(before, tmp_path)
    assert [node.op_type for node in small.graph.node] == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    assert_equal_runs(before, small, {"x": normal(2, 3, 8)})
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), options, providers=["CPUExecutionProvider"])
    found = onnx.load(tmp_path / "optimised.onnx").graph.node
    assert [node.op_type for node in found] == ["SimplifiedLayerNormalization"]
