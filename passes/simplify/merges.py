"""Sibling linear maps of one value as one wide map; off by default, because it pays only on some hardware and sizes.

    q, k, v = linear(x, wq), linear(x, wk), linear(x, wv)      q, k, v = split(linear(x, [wq wk wv]))
    linear(f(linear(x, a)), b) + linear(f(linear(x, c)), d)    linear(f(linear(x, [a c])), [b d])

Parameters and MACs stay what they are: there are fewer and larger products, and a split, which copies nothing in torch
but does in some runtimes. On one CPU core, in float32, three projections take 0.89 of the time for one token of width
256 and 0.97 for one of width 768, but 1.06 for 128 tokens of width 768; two feed-forward layers 0.81, 0.92 and 1.03
(the same module against itself: 1.00 to 1.04). ``simplify{also=merges}`` applies these rules beside all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.rewriting.matcher import Match
from regauge.ir.rewriting.rewrite import RewriteRule, RuleSet, refuse
from regauge.passes.simplify.affine import weights
from regauge.passes.simplify.fixed_values import Fixed, combined, fixed, new_weight
from regauge.passes.simplify.linear_map import (
    X,
    bias_of,
    channel_axis,
    channels,
    must_fit,
    old_bias,
    own_weight,
)

MERGED = ("linear", "conv")
POINTWISE = ("relu", "gelu", "silu", "tanh", "sigmoid", "hardswish", "leaky_relu", "softplus", "mish", "elu")


def joint_name(parameters: Sequence[Parameter], kind: str) -> str:
    """``attn.q_k_v.weight`` for ``attn.q.weight``, ``attn.k.weight`` and ``attn.v.weight``."""
    stems = [parameter.name.removesuffix("weight").removesuffix(".") for parameter in parameters]
    parent = stems[0].rpartition(".")[0]
    joint = "_".join(stem.rpartition(".")[2] for stem in stems)
    return ".".join(part for part in (parent, joint, kind) if part)


def stacked(build: Builder, nodes: Sequence[Node], axis: int) -> tuple[Parameter, Parameter | None]:
    """The weights of some maps laid side by side along an axis, and their biases along the channels."""
    own = [own_weight(build, node) for node in nodes]
    if len({weight.dtype for weight in own}) > 1:
        return refuse("their weights have different types")
    shape = list(own[0].weight.shape)
    shape[axis] = sum(weight.weight.shape[axis] for weight in own)
    parts = [fixed(build, weight) for weight in own]
    joined = combined(lambda *tensors: torch.cat(tensors, axis), *[part for part in parts if part is not None])
    weight = new_weight(build, joint_name(own, "weight"), own[0], joined, shape)
    if axis != 0 or all(bias_of(node) is None for node in nodes):
        return weight, None
    vectors = [wide_bias(node) for node in nodes]
    bias = combined(lambda *tensors: torch.cat(tensors), *vectors)
    return weight, new_weight(build, joint_name(own, "bias"), own[0], bias, (shape[0],))


def wide_bias(node: Node) -> Fixed:
    size = channels(node)
    return combined(lambda tensor: tensor.expand(size), old_bias(node))


def merge_siblings(build: Builder, match: Match) -> tuple[Value, ...]:
    """Linear maps of one value are one map, whose result is split."""
    nodes = [match[name] for name in ("first", "second", "third") if name in match.bindings]
    first = nodes[0]
    if any(node.op != first.op or node.attributes != first.attributes for node in nodes):
        return refuse("they are different operators, or walk differently")
    if first.op == "conv" and first.attributes["groups"] != 1:
        return refuse("their channels are in groups")
    if len({tuple(node.inputs[1].shape[1:]) for node in nodes}) > 1:
        return refuse("their kernels have different sizes")
    ends = [end for node in nodes if (end := _summed_in(node)) is not None]
    if len(set(ends)) < len(ends):
        return refuse("they start feed-forward layers that are summed, and merged as a whole")
    weight, bias = stacked(build, nodes, 0)
    with build.at(first):
        whole = build(first.op, first.inputs[X], weight, bias, **first.attributes)
        parts: tuple[Value, ...] = build.split(
            whole, sizes=tuple(channels(node) for node in nodes), dim=channel_axis(first)
        )
    return tuple(must_fit(part, node.output) for part, node in zip(parts, nodes, strict=True))


def _summed_in(node: Node) -> Node | None:
    """The sum that the feed-forward layer which a linear map starts is a term of; None where it starts none."""
    for ops in (POINTWISE, ("linear",), ("add",)):
        readers = node.output.consumers()
        if len(readers) != 1 or readers[0].op not in ops:
            return None
        node = readers[0]
    return node


def merge_feed_forward(build: Builder, match: Match) -> Value:
    """Two feed-forward layers of one value that are summed are one wide layer."""
    up, second_up, down, second_down = (match[name] for name in ("up", "other_up", "down", "other_down"))
    act, other = match["act"], match["other_act"]
    if act.op != other.op or act.attributes != other.attributes:
        return refuse("their activations are different")
    weight, bias = stacked(build, (up, second_up), 0)
    with build.at(up):
        hidden = build.linear(up.inputs[X], weight, bias)
    with build.at(act):
        hidden = build(act.op, hidden, **act.attributes)
    out, _ = stacked(build, (down, second_down), 1)
    last: Parameter | None = None
    if bias_of(down) is not None or bias_of(second_down) is not None:
        total = combined(torch.add, wide_bias(down), wide_bias(second_down))
        last = new_weight(build, out.name.removesuffix("weight") + "bias", out, total, (channels(down),))
    with build.at(down):
        return must_fit(build.linear(hidden, out, last), match.roots[0])


# -- samples -----------------------------------------------------------------------------------------------------------


def sibling_samples(count: int) -> Callable[[], Iterator[dict[str, Any]]]:
    names = ("first", "second", "third")[:count]

    def draw() -> Iterator[dict[str, Any]]:
        linear = {f"{name}.op": "linear" for name in names}
        conv = {f"{name}.op": "conv" for name in names}
        walk = {f"{name}.attributes": {"stride": (2, 1), "padding": (1, 0)} for name in names}
        lines = {"w": randn(5, 4), "v": randn(2, 4), **({"u": randn(3, 4)} if count == 3 else {})}
        planes = {"w": randn(5, 4, 3, 2), "v": randn(2, 4, 3, 2), **({"u": randn(1, 4, 3, 2)} if count == 3 else {})}
        yield weights({"x": randn(2, 3, 4), **lines, **linear})
        yield weights({"x": randn(2, 3, 4), **lines, "b": randn(5), **linear})
        yield weights({"x": randn(2, 4, 5, 5), **planes, "c": randn(2), **conv, **walk})

    return draw


def _feed_forward_samples() -> Iterator[dict[str, Any]]:
    given = {"x": randn(2, 3, 4), "w": randn(5, 4), "v": randn(4, 5), "a": randn(7, 4), "e": randn(4, 7)}
    for act in ("relu", "gelu"):
        yield weights({**given, "act.op": act, "other_act.op": act, "b": randn(5), "f": randn(4)})
    yield weights({**given, "act.op": "silu", "other_act.op": "silu"})


# -- rules -------------------------------------------------------------------------------------------------------------


def _two(op: Any, x: Any, w: Any, v: Any, b: Any = None, c: Any = None) -> Any:
    first = op.any_of(MERGED, x, w, b, name="first", attributes=...)
    return first, op.any_of(MERGED, x, v, c, name="second", attributes=...)


def three_siblings(op: Any, x: Any, w: Any, v: Any, u: Any, b: Any = None, c: Any = None, d: Any = None) -> Any:
    return *_two(op, x, w, v, b, c), op.any_of(MERGED, x, u, d, name="third", attributes=...)


def _feed_forward(
    op: Any, x: Any, w: Any, v: Any, a: Any, e: Any, b: Any = None, c: Any = None, d: Any = None, f: Any = None
) -> Any:
    act = op.any_of(POINTWISE, op.linear(x, w, b, name="up"), name="act", attributes=...)
    other = op.any_of(POINTWISE, op.linear(x, a, d, name="other_up"), name="other_act", attributes=...)
    return op.add(op.linear(act, v, c, name="down"), op.linear(other, e, f, name="other_down"))


RULES = RuleSet(
    [
        RewriteRule("parallel-feed-forward", _feed_forward, merge_feed_forward, samples=_feed_forward_samples),
        RewriteRule("three-siblings", three_siblings, merge_siblings, samples=sibling_samples(3)),
        RewriteRule("two-siblings", _two, merge_siblings, samples=sibling_samples(2)),
    ]
)
