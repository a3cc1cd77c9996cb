"""Linear maps that read what lies side by side, or whose results may: several become one, whose weights lie so too.

    conv(concat(x, y), w) + conv(z, v)                              conv(concat(x, y, z), [w v])
    conv(conv(x, u), a), conv(conv(x, v), b), conv(conv(x, w), c)   conv(part, a) ... of split(conv(x, [u v w]))

Parameters and MACs stay what they are. What changes is what is moved: an operand more is copied into a concatenation,
where a sum was read and written; a value is read once for several narrow maps, whose results are copied apart. A rule
applies where fewer numbers are moved afterwards than before. Wide projections, as those of an attention, are left to
the set ``merges``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Value
from regauge.ir.rewriting.matcher import Match
from regauge.ir.rewriting.rewrite import RewriteRule, RuleSet, differs, refuse
from regauge.ir.sizes.expressions import Size, product, same
from regauge.passes.simplify.affine import weights
from regauge.passes.simplify.fixed_values import combined, itself, successor
from regauge.passes.simplify.kernels import geometry, kernel_size
from regauge.passes.simplify.linear_map import (
    X,
    bias_of,
    channels,
    input_axis,
    must_fit,
    old_bias,
    own_weight,
    placed_bias,
    rebuilt,
)
from regauge.passes.simplify.merges import merge_siblings, three_siblings
from regauge.passes.simplify.pieces import axis_of

SUMMED = ("linear", "conv")


def _moves(*shapes: tuple[Size, ...]) -> int:
    """How many numbers are read or written, of dynamic sizes one each."""
    return sum(int(product(size if isinstance(size, int) else 1 for size in shape)) for shape in shapes)


def _check_alike(nodes: list[Node]) -> None:
    first = nodes[0]
    if any(node.op != first.op for node in nodes):
        refuse("they are different operators")
    if first.op == "conv" and len({(kernel_size(node), geometry(node)) for node in nodes}) > 1:
        refuse("their kernels have different sizes, or walk differently")
    if first.attributes.get("groups", 1) != 1:
        refuse("their channels are in groups")


def sum_over_concat(build: Builder, whole: Node, other: Node, concat: Node, match: Match) -> Value:
    """A linear map of a concatenation plus another linear map is one, of the concatenation with one operand more."""
    _check_alike([whole, other])
    axis = input_axis(whole)
    if axis_of(concat) != axis:
        return refuse("its operand is concatenated along another axis")
    x, old = other.inputs[X], concat.output
    assert isinstance(x, Value)
    if x.rank != old.rank or x.dtype != old.dtype:
        return refuse("their operands have different ranks or types")
    if not all(same(a, b) for place, (a, b) in enumerate(zip(x.shape, old.shape, strict=True)) if place != axis):
        return refuse("their operands have different shapes")
    out = match.roots[0]
    if 2 * _moves(x.shape) > 3 * _moves(out.shape):
        return refuse("to copy its operand would take longer than to add its result")
    own, second = own_weight(build, whole), own_weight(build, other)
    if own.dtype != second.dtype:
        return refuse("their weights have different types")
    shape = list(own.weight.shape)
    shape[1] += second.weight.shape[1]
    both = combined(lambda w, v: torch.cat([w, v], 1), itself(own), itself(second))
    weight = successor(build, own, both, shape)
    bias = bias_of(whole)
    if bias is not None or bias_of(other) is not None:
        size = channels(whole)
        total = combined(lambda b, c: b.expand(size) + c.expand(size), old_bias(whole), old_bias(other))
        bias = placed_bias(build, whole, total)
    with build.at(concat):
        joined = build.concat(*concat.inputs, x, dim=axis, name=concat.name)
    return must_fit(rebuilt(build, whole, weight, bias, joined), out)


def narrow_siblings(build: Builder, match: Match) -> tuple[Value, ...]:
    """Three narrow linear maps of one wide value, before other maps, are one map, whose result is split."""
    nodes = [match[name] for name in ("first", "second", "third")]
    results = [node.output for node in nodes]
    if not all(reader.op in SUMMED and slot == X for result in results for reader, slot in result.uses):
        return differs("what reads them is no linear map: a runtime may do it together with them")
    _check_alike(nodes)
    x = nodes[0].inputs[X]
    assert isinstance(x, Value)
    if 2 * _moves(x.shape) < 2 * _moves(*(result.shape for result in results)):
        return refuse("to copy their results apart would take longer than to read their operand again")
    return merge_siblings(build, match)


# -- samples -----------------------------------------------------------------------------------------------------------


def _sum_samples() -> Iterator[dict[str, Any]]:
    def joined(build: Builder, y: Value) -> list[Value]:
        return [build.tanh(y)]

    walk = {"stride": (2, 1), "padding": (1, 0)}
    convs = {"concat.operands": joined, "whole.op": "conv", "other.op": "conv"}
    planes = {"x": randn(2, 4, 5, 5).double(), "y": randn(2, 3, 5, 5).double(), "concat.dim": -3, **convs}
    kernels = weights({"w": randn(6, 6, 3, 2), "v": randn(6, 4, 3, 2)})
    yield {**planes, **kernels, "whole.attributes": walk, "other.attributes": walk}
    yield {**planes, **kernels, **weights({"b": randn(6)})}
    lines = {"x": randn(2, 4).double(), "y": randn(2, 3).double(), "concat.dim": 1, "concat.operands": joined}
    matrices = weights({"w": randn(5, 6), "v": randn(5, 4), "b": randn(5), "c": randn(5)})
    yield {**lines, **matrices, "whole.op": "linear", "other.op": "linear"}


def _narrow_samples() -> Iterator[dict[str, Any]]:
    linear, conv = ({f"{name}.op": op for name in ("first", "second", "third")} for op in ("linear", "conv"))
    walk = {f"{name}.attributes": {"stride": (2, 1), "padding": (1, 0)} for name in ("first", "second", "third")}
    lines = {"x": randn(2, 3, 12), "w": randn(3, 12), "v": randn(2, 12), "u": randn(1, 12), "b": randn(3)}
    kernels = {"w": randn(3, 12, 3, 2), "v": randn(2, 12, 3, 2), "u": randn(1, 12, 3, 2), "c": randn(2)}
    yield weights({**lines, **linear})
    yield weights({"x": randn(2, 12, 5, 5), **kernels, **conv, **walk})


# -- rules -------------------------------------------------------------------------------------------------------------


def _sum(op: Any, x: Any, y: Any, w: Any, v: Any, b: Any = None, c: Any = None) -> Any:
    concat = op.concat(y, ..., dim=..., name="concat")
    whole = op.any_of(SUMMED, concat, w, b, name="whole", attributes=...)
    return op.add(whole, op.any_of(SUMMED, x, v, c, name="other", attributes=...))


RULES = RuleSet(
    [
        RewriteRule("sum-over-concat", _sum, sum_over_concat, samples=_sum_samples),
        RewriteRule("narrow-siblings", three_siblings, narrow_siblings, samples=_narrow_samples),
    ]
)
