"""The way back from a layer that S2FT split: a map of the first channels and one of the others are one map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Value
from regauge.ir.rewriting.rewrite import RewriteRule, refuse
from regauge.passes.simplify.affine import weights
from regauge.passes.simplify.fixed_values import combined, itself, successor
from regauge.passes.simplify.linear_map import must_fit, own_weight

_MAPS = ("linear", "matmul", "conv")


def _pattern(op: Any, x: Any, w: Any, v: Any, k: Any, n: Any, d: Any, b: Any = None) -> Any:
    first = op.any_of(_MAPS, op.slice(x, dim=d, start=0, end=k, step=1), w, name="front", attributes=...)
    others = op.slice(x, dim=d, start=k, end=n, step=1)
    return op.add(op.any_of(_MAPS, others, v, b, name="rest", attributes=...), first)


def _joined(build: Builder, x: Value, front: Node, rest: Node) -> Value:
    """linear(x[:, :k], w) + linear(x[:, k:], v, b) is linear(x, [w v], b)."""
    if front.op != rest.op or front.attributes != rest.attributes or front.attributes.get("groups", 1) != 1:
        return refuse("they are maps of different kinds")
    first, weight = own_weight(build, front), own_weight(build, rest)
    axis = 0 if rest.op == "matmul" else 1
    parts = combined(lambda left, right: torch.cat([left, right], axis), itself(first), itself(weight))
    pairs = zip(first.weight.shape, weight.weight.shape, strict=True)
    shape = [a + b if place == axis else b for place, (a, b) in enumerate(pairs)]
    with build.at(rest):
        whole = successor(build, weight, parts, shape)
        found = build(rest.op, x, whole, *rest.inputs[2:], name=rest.name, **rest.attributes)
    return must_fit(found, rest.output)


def _samples() -> Iterator[dict[str, Any]]:
    cut = {"k": 2, "n": 6, "d": 1}
    for op, first, others in (("linear", (4, 2), (4, 4)), ("matmul", (2, 4), (4, 4)), ("conv", (4, 2, 3), (4, 4, 3))):
        x = randn(2, 6, 5) if op == "conv" else randn(3, 6)
        bias = {} if op == "matmul" else {"b": randn(4)}
        yield weights({"x": x, "w": randn(*first), "v": randn(*others), **bias, **cut, "front.op": op, "rest.op": op})


CHANNELS = RewriteRule("channels-side-by-side", _pattern, _joined, samples=_samples)
