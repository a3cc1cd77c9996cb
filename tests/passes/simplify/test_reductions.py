"""Norms of vectors that are written as squares, sums and roots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, randn

import regauge
from onnx_simplified import assert_equal_runs, normal, parsed
from onnx_simplified import simplified as simplified_file
from regauge.ir.edit import Builder
from regauge.ir.graph import Value
from regauge.passes.simplify.catalog import RULE_SETS
from simplified import refusals
from simplified import simplified as simplified_module
from simplifying import made, ops

RULES = RULE_SETS["reductions"]


class Unit(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x * x).sum(-1, keepdim=True).sqrt()


def test_a_root_of_squares_is_a_norm() -> None:
    assert ops(simplified_module(Unit(), randn(3, 4))) == ["vector_norm", "div"]


UNIT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[n, 4] x) => (float[n, 4] y) {
  two = Constant <value_float = 2.0> ()
  half = Constant <value_float = 0.5> ()
  axes = Constant <value_ints = [-1]> ()
  s = Pow (x, two)
  t = ReduceSum <keepdims = 1> (s, axes)
  r = Pow (t, half)
  y = Div (x, r)
}"""


def test_powers_in_a_file(tmp_path: Path) -> None:
    small = simplified_file(before := parsed(UNIT), tmp_path)
    assert [node.op_type for node in small.graph.node if node.op_type != "Constant"] == ["ReduceL2", "Div"]
    assert_equal_runs(before, small, {"x": normal(3, 4)})
    assert ops(regauge.load(tmp_path / "small.onnx")) == ["vector_norm", "div"]


def product(build: Builder, x: Value) -> Value:
    return build.sqrt(build.sum(build.mul(x, build.abs(x)), dims=(1,), keepdim=True))  # type: ignore[no-any-return]


def cube(build: Builder, x: Value) -> Value:
    return build.sqrt(build.sum(build.pow(x, 3), dims=(1,), keepdim=True))  # type: ignore[no-any-return]


def read(build: Builder, x: Value) -> list[Value]:
    total = build.sum(build.mul(x, x), dims=(1,), keepdim=True)
    return [build.sqrt(total), total]


@pytest.mark.parametrize("function", [product, cube, read])
def test_what_is_no_norm_stays(function: Callable[..., Any]) -> None:
    refusals(made(function, x=(3, 4)), RULES)
