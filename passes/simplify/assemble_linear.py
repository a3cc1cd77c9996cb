"""Linear layers put together again from products with a weight, and sums with a bias.

matmul(x, permute(w, (1, 0)))        linear(x, w)
matmul(x, w)                         linear(x, w')      the weight is stored the other way round
linear(x, w) + b                     linear(x, w, b)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Operand, Parameter, Value
from regauge.ir.rewriting.pattern_instances import Weight
from regauge.ir.rewriting.rewrite import RuleSet, refuse, rule
from regauge.ir.sizes.expressions import same


def _samples(*shape: int) -> list[dict[str, Any]]:
    w = {"w": Weight(randn(*shape).double())}
    return [{"x": randn(2, 3, 6).double(), **w}, {"x": randn(5, 6).double(), **w}]


def _matrix(w: Operand) -> Parameter:
    if not isinstance(w, Parameter) or w.rank != 2 or w.kind != "parameter":
        return refuse(f"{w} is no matrix of weights")
    return w


@rule(lambda op, x, w: op.matmul(x, op.permute(w, dims=(1, 0))), samples=lambda: _samples(4, 6))
def linear_of_transpose(build: Builder, x: Value, w: Operand) -> Value:
    """A product with the transpose of a weight is a linear layer."""
    return build.linear(x, _matrix(w))  # type: ignore[no-any-return]


@rule(lambda op, x, w: op.matmul(x, w), samples=lambda: _samples(6, 4))
def linear_of_matrix(build: Builder, x: Operand, w: Operand) -> Value:
    """A product with a weight is a linear layer of its transpose, which is stored in its place."""
    weight = _matrix(w)
    if not isinstance(x, Value) or isinstance(x, Parameter):
        return refuse("it multiplies weights with weights")
    if len(weight.uses) > 1 or any(output is weight for output in build.graph.outputs):
        return refuse(f"its weight {weight.name} has other readers")
    inputs, outputs = weight.weight.shape
    return build.linear(x, build.folded(weight, lambda t: t.t(), shape=(outputs, inputs)))  # type: ignore[no-any-return]


def _bias_samples() -> Iterable[dict[str, Any]]:
    for shape in ((4,), (1, 4), (1, 1, 4)):
        yield {**_samples(4, 6)[0], "bias": Weight(torch.randn(shape).double())}


@rule(lambda op, x, w, bias: op.add(op.linear(x, w), bias), samples=_bias_samples)
def bias_into_linear(build: Builder, x: Value, w: Operand, bias: Operand) -> Value:
    """A vector of weights that is added to a linear layer is its bias."""
    weight = _matrix(w)
    outputs = weight.shape[0]
    if not isinstance(bias, Parameter) or bias.dtype != weight.dtype or not bias.rank or bias.kind != "parameter":
        return refuse(f"{bias} is no vector of weights")
    if not same(bias.shape[-1], outputs) or any(size != 1 for size in bias.shape[:-1]):
        return refuse(f"{bias} does not run along its outputs alone")
    if bias.rank > 1 and len(bias.uses) > 1:
        return refuse(f"its bias {bias.name} has axes of size one, and other readers")
    if bias.rank > 1:
        bias = build.folded(bias, lambda t: t.reshape(-1), shape=bias.weight.shape[-1:])
    return build.linear(x, weight, bias)  # type: ignore[no-any-return]


RULES = RuleSet([linear_of_transpose, linear_of_matrix, bias_into_linear])
