"""Biases before attention that it does not feel, or that it passes on.

    attention(q, k + b, v)    attention(q, k, v)       q b is the same for all keys, and softmax drops it
    attention(q, k, v + b)    attention(q, k, v) + b   the weights of a row have the sum one

so the bias of a value projection moves into that of the output projection, and the bias of a key projection goes.
Nothing but changes of layout may stand between: neither a rotation nor a norm nor a cache. The second law fails for a
row that is masked as a whole, whose result is no average of values; so a mask must be absent, causal, or a constant
that leaves something of each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir.axis_rules.rules import Axes
from regauge.ir.dims.extents import Extent, leaves
from regauge.ir.dims.local_axes import lay_along, local_axes
from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.rewriting.pattern_instances import Constant
from regauge.ir.rewriting.rewrite import RewriteRule, RuleSet, refuse
from regauge.passes.simplify.affine import weights
from regauge.passes.simplify.fixed_values import combined, fixed
from regauge.passes.simplify.kernels import kernel
from regauge.passes.simplify.linear_map import LAYOUTS, axes_of, channel_axis, old_bias, placed_bias, rebuilt

K, V, MASK = 1, 2, 3  # operand slots of attention


def _carried(projection: Node, layouts: Sequence[Node]) -> tuple[Extent, Axes]:
    """The output channels of a projection, and the axes of its result behind changes of layout."""
    axes = axes_of(projection).results[0]
    channel = axes[channel_axis(projection)]
    for layout in layouts:
        axes = axes_of(layout, axes).results[0]
    if set(leaves(channel)) & set(leaves(axes[-2])):
        refuse("its channels are laid along the axis of positions")
    return channel, axes


def _again(build: Builder, layouts: Sequence[Node], value: Value) -> Value:
    for layout in layouts:
        with build.at(layout):
            value = build(layout.op, value, *layout.inputs[1:], **layout.attributes)
    return value


def _without_bias(build: Builder, projection: Node, layouts: Sequence[Node]) -> Value:
    weight: Any = projection.inputs[1]
    return _again(build, layouts, rebuilt(build, projection, weight, None))


def _with_operand(build: Builder, attention: Node, slot: int, value: Value) -> Value:
    operands = [value if place == slot else operand for place, operand in enumerate(attention.inputs)]
    with build.at(attention):
        result: Value = build(attention.op, *operands, name=attention.name, **attention.attributes)
    return result


def drop_key_bias(build: Builder, attention: Node, projection: Node, first: Node, second: Node) -> Value:
    """The bias of keys adds the same number to all scores of a row, which softmax does not feel."""
    if fixed(build, projection.inputs[2]) is None:
        return refuse("the bias of the keys is computed from inputs")
    _carried(projection, (first, second))
    return _with_operand(build, attention, K, _without_bias(build, projection, (first, second)))


def move_value_bias(
    build: Builder,
    attention: Node,
    projection: Node,
    first: Node,
    second: Node,
    third: Node,
    fourth: Node,
    output: Node,
) -> Value:
    """The bias of values passes through attention, and the output projection takes it over."""
    if attention.attributes["dropout_p"]:
        return refuse("dropout of attention weights changes the sum of a row")
    _check_mask(build, attention)
    bias = fixed(build, projection.inputs[2])
    if bias is None:
        return refuse("the bias of the values is computed from inputs")
    channel, axes = _carried(projection, (first, second))
    inner = local_axes(attention, {V: axes})
    if inner is None:
        return refuse("the axis rule of attention does not fit")
    behind = axes_of(fourth, axes_of(third, inner.results[0]).results[0]).results[0]
    lay = lay_along(behind[-1:], channel)
    if lay is None:
        return refuse("the channels of the values are not those that the output projection reads")
    moved = combined(lambda w, b, old: w @ lay(b) + old, kernel(build, output), bias, old_bias(output))
    new = placed_bias(build, output, moved)
    value = _with_operand(build, attention, V, _without_bias(build, projection, (first, second)))
    weight: Any = output.inputs[1]
    return rebuilt(build, output, weight, new, _again(build, (third, fourth), value))


def _check_mask(build: Builder, attention: Node) -> None:
    """Refuse a mask that may leave nothing of a row."""
    mask = attention.inputs[MASK] if len(attention.inputs) > MASK else None
    if mask is None:
        return
    if not isinstance(mask, Parameter) or mask in build.held or mask.kind == "parameter":
        refuse("its mask is not known: a row that is masked as a whole has no sum of one")
        return
    table = mask.tensor
    open_ = table if table.dtype == torch.bool else torch.isfinite(table)
    if not bool(open_.any(-1).all()) or bool((table == torch.inf).any()):
        refuse("its mask leaves nothing of some rows")


# -- rules -------------------------------------------------------------------------------------------------------------


def _turned(op: Any, value: Any, *names: str) -> Any:
    for name in names:
        value = op.any_of(LAYOUTS, value, name=name, attributes=...)
    return value


def _key_pattern(op: Any, x: Any, w: Any, b: Any, q: Any, v: Any, mask: Any = None) -> Any:
    key = _turned(op, op.linear(x, w, b, name="projection"), "first", "second")
    return op.attention(q, key, v, mask, name="attention", attributes=...)


def _value_pattern(op: Any, x: Any, w: Any, b: Any, q: Any, k: Any, o: Any, mask: Any = None, c: Any = None) -> Any:
    value = _turned(op, op.linear(x, w, b, name="projection"), "first", "second")
    attention = op.attention(q, k, value, mask, name="attention", attributes=...)
    return op.linear(_turned(op, attention, "third", "fourth"), o, c, name="output")


def _heads(count: int) -> dict[str, Any]:
    """Projections of width 6 to ``count`` heads of 2, behind 5 positions of a batch of 3."""
    return {
        "x": randn(3, 5, 6), "w": randn(2 * count, 6), "b": randn(2 * count), "q": randn(3, 4, 5, 2),
        "first.op": "reshape", "first.attributes": {"shape": (3, 5, count, 2)},
        "second.op": "permute", "second.attributes": {"dims": (0, 2, 1, 3)},
    }  # fmt: skip


def _samples(**extra: Any) -> Iterator[dict[str, Any]]:
    moving = {"x", "q", "k", "v"}
    few_allowed = {"attention.attributes": {"scale": 0.5, "enable_gqa": True}}
    masks: list[dict[str, Any]] = [{}, {"mask": Constant(randn(5, 5).double())}]
    masks.append({"mask": Constant(torch.tril(torch.ones(5, 5)) > 0)})
    for count in (4, 2):
        for mask in masks:
            given = {
                **_heads(count),
                **{k: v[count] if isinstance(v, dict) and count in v else v for k, v in extra.items()},
            }
            plain = {k: v.double() for k, v in given.items() if k in moving}
            attributes = few_allowed if count == 2 else {"attention.attributes": {"scale": 0.5, "is_causal": not mask}}
            yield {**weights({k: v for k, v in given.items() if k not in moving}), **plain, **mask, **attributes}


def _key_samples() -> Iterator[dict[str, Any]]:
    return _samples(v={count: randn(3, count, 5, 3) for count in (2, 4)})


def _value_samples() -> Iterator[dict[str, Any]]:
    behind = {"third.op": "permute", "third.attributes": {"dims": (0, 2, 1, 3)}, "fourth.op": "reshape",
              "fourth.attributes": {"shape": (3, 5, 8)}}  # fmt: skip
    keys = {count: randn(3, count, 5, 2) for count in (2, 4)}
    yield from _samples(k=keys, o=randn(7, 8), **behind)
    yield from _samples(k=keys, o=randn(7, 8), c=randn(7), **behind)


RULES = RuleSet(
    [
        RewriteRule("key-bias", _key_pattern, drop_key_bias, samples=_key_samples),
        RewriteRule("value-bias", _value_pattern, move_value_bias, samples=_value_samples),
    ]
)
