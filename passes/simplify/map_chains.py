"""Linear maps in a row become one, where that does not cost more; scales in a row and shifts in a row become one.

    linear(w1, b1) -> linear(w2, b2)    linear(w2 w1, w2 b1 + b2)
    conv 1x1 -> conv kxk                conv kxk, unless the bias of the first one would be missing in a border
    conv kxk -> conv 1x1                conv kxk
    mul(mul(x, a), b)                   mul(x, a b)

A product of two narrow maps may be far wider than they are, so parameters and MACs are compared before each merge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Operand, Value
from regauge.ir.rewrite import RuleSet, refuse, rule
from regauge.passes.simplify.affine import weights
from regauge.passes.simplify.fixed_values import Fixed, combined, successor
from regauge.passes.simplify.kernels import MATRICES, composed, is_pointwise, matrix, stays_in_step, through
from regauge.passes.simplify.linear_map import (
    X,
    bias_of,
    has_zero_padding,
    must_fit,
    must_pay,
    old_bias,
    own_weight,
    placed_bias,
    rebuilt,
)

CHAINED = ("linear", "matmul", "conv")


def _chain_samples() -> Iterable[dict[str, Any]]:
    x, image = randn(3, 5, 4), randn(2, 4, 7, 7)
    for first, second in (("linear", "linear"), ("matmul", "linear"), ("linear", "matmul"), ("matmul", "matmul")):
        left = randn(9, 4) if first == "linear" else randn(4, 9)
        right = randn(3, 9) if second == "linear" else randn(9, 3)
        biases = {"b": randn(9)} if first == "linear" else {}
        biases |= {"c": randn(3)} if second == "linear" else {}
        yield weights({"x": x, "w": left, "v": right, "first.op": first, "second.op": second, **biases})
    convs = {"x": image, "first.op": "conv", "second.op": "conv"}
    kernel = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
    yield weights({**convs, "w": randn(32, 4, 1, 1), "v": randn(6, 16, 3, 3), "second.attributes": kernel})
    yield weights({**convs, "w": randn(32, 2, 1, 1), "v": randn(6, 32, 2, 2), "b": randn(32), "c": randn(6),
                   "first.attributes": {"groups": 2}})  # fmt: skip
    yield weights({**convs, "w": randn(32, 2, 3, 3), "v": randn(4, 16, 1, 1), "b": randn(32),
                   "first.attributes": kernel, "second.attributes": {"groups": 2, "stride": (2, 2)}})  # fmt: skip


@rule(
    lambda op, x, w, v, b=None, c=None: op.any_of(
        CHAINED, op.any_of(CHAINED, x, w, b, name="first", attributes=...), v, c, name="second", attributes=...
    ),
    samples=_chain_samples,
)
def maps_in_a_row(build: Builder, first: Node, second: Node) -> Value:
    """Two linear maps in a row are one, if it has no more parameters and MACs than both."""
    own_weight(build, first)
    weight = own_weight(build, second)
    if (first.op in MATRICES) != (second.op in MATRICES):
        return refuse(f"a {first.op} and a {second.op} are no one map")
    x = first.inputs[X]
    attributes = dict(second.attributes)
    if second.op in MATRICES:
        product = combined(lambda a, b: b @ a, matrix(first), matrix(second))
        shape: tuple[Any, ...] = (second.output.shape[-1], x.shape[-1])  # type: ignore[union-attr]
        if second.op == "matmul":
            product, shape = combined(torch.t, product), shape[::-1]
    else:
        product, attributes, shape = _composed(first, second)
    merged = successor(build, weight, product, shape)
    bias: Operand = bias_of(second)
    if bias_of(first) is not None:
        bias = placed_bias(build, second, combined(torch.add, through(second, old_bias(first)), old_bias(second)))
    if second.op in MATRICES:
        result = rebuilt(build, second, merged, bias, x)
    else:
        result = build.conv(x, merged, bias, name=second.name, **attributes)
    must_pay(build, [first, second])
    return must_fit(result, second.output)


def _composed(first: Node, second: Node) -> tuple[Fixed, dict[str, Any], tuple[int, ...]]:
    narrow = is_pointwise(first) and stays_in_step(first)
    if not narrow and not is_pointwise(second):
        return refuse("neither of the two kernels has one entry")
    if bias_of(first) is not None and has_zero_padding(second):
        return refuse("the bias of the first one would be missing in the border of zeros")
    product, walk = composed(first, second)
    outputs, _, *kernel = second.inputs[1].shape  # type: ignore[union-attr]
    inputs = first.inputs[1].shape[1] * first.attributes["groups"]  # type: ignore[union-attr]
    kernel = kernel if narrow else first.inputs[1].shape[2:]  # type: ignore[union-attr,assignment]
    return product, walk.attributes(), (outputs, inputs // walk.groups, *kernel)


RULES = RuleSet([maps_in_a_row])
