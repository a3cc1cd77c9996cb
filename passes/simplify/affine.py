"""Scales and shifts behind a linear map, folded into its weights.

    conv(x, w, b) -> batch_norm          conv(x, w', b')
    linear(x, w, b) -> mul(s)            linear(x, w', b')
    matmul(x, w) -> permute -> div(s)    matmul(x, w') -> permute

A reshape or a permutation may stand between, as long as the axes that the scale runs along are output channels before
it. A weight that something else reads is never folded into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import rand, randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.rewriting.pattern_instances import Weight
from regauge.ir.rewriting.rewrite import RewriteRule, RuleSet, refuse
from regauge.passes.simplify.affine_steps import PAIRS, Affine, affine_of
from regauge.passes.simplify.fixed_values import combined, itself, new_weight, number, successor
from regauge.passes.simplify.linear_map import (
    LAYOUTS,
    MAPS,
    W,
    axes_of,
    bias_of,
    channel_axis,
    channels,
    old_bias,
    own_weight,
    placed_bias,
    rebuilt,
)

Wrap = Callable[[Any, Any], Any]  # what stands between a map and a step: nothing, or a change of layout


def fold_behind(build: Builder, map: Node, affine: Node, layout: Node | None = None) -> Value:
    """``s * (w x + b) + t`` is ``(s w) x + (s b + t)``, with what stands between."""
    inner = map if layout is None else layout
    axes = axes_of(map)
    seen = axes.results[0] if layout is None else axes_of(layout, axes.results[0]).results[0]
    scale, shift = affine_of(build, affine, _slot_of(affine, inner.output), seen)
    weight: Any = map.inputs[W]
    if scale is not None:
        weight = own_weight(build, map)
        factors = scale.along(axes.operands[W], "the output channels")
        weight = successor(build, weight, combined(torch.mul, itself(weight), factors))
    bias = _bias_behind(build, map, affine, Affine(scale, shift), axes.results[0][channel_axis(map)])
    result = rebuilt(build, map, weight, bias)
    if layout is None:
        return result
    with build.at(layout):
        moved: Value = build(layout.op, result, *layout.inputs[1:], **layout.attributes)
    return moved


def _bias_behind(build: Builder, map: Node, affine: Node, step: Affine, channel: Any) -> Any:
    if bias_of(map) is None and step.shift is None:
        return None
    if map.op == "matmul" and affine.op != "batch_norm":
        return refuse("a matmul has no bias")
    if not isinstance(map.inputs[W], Parameter):
        return refuse("its weight is computed")
    what = "the output channels"
    scale = number(1.0) if step.scale is None else step.scale.along([channel], what)
    shift = number(0.0) if step.shift is None else step.shift.along([channel], what)
    return placed_bias(build, map, combined(lambda b, s, t: b * s + t, old_bias(map), scale, shift))


def scale_biased_matmul(build: Builder, map: Node, shift: Node, scale: Node) -> Value:
    """A scale behind a matmul and the addition of its bias goes into both."""
    weight, axes = own_weight(build, map), axes_of(map)
    seen, what = axes.results[0], "the output channels"
    inner = affine_of(build, shift, _slot_of(shift, map.output), seen)
    outer = affine_of(build, scale, _slot_of(scale, shift.output), seen)
    if inner.scale is not None or inner.shift is None or outer.scale is None or outer.shift is not None:
        return refuse("it is no scale of a shift")
    factors = outer.scale.along(axes.operands[W], what)
    new = successor(build, weight, combined(torch.mul, itself(weight), factors))
    channel, size = [seen[channel_axis(map)]], channels(map)
    parts = inner.shift.along(channel, what), outer.scale.along(channel, what)
    vector = combined(lambda t, s: (t * s).expand(size), *parts)
    old = shift.inputs[1 - _slot_of(shift, map.output)]
    if isinstance(old, Parameter) and len(old.uses) == 1 and old.dtype == weight.dtype:
        # a subtracted bias is added from now on
        bias = successor(build, old, vector, (size,))
    else:
        bias = new_weight(build, f"{weight.name}_bias", weight, vector, (size,))
    result = rebuilt(build, map, new, None)
    with build.at(shift):
        return build.add(result, bias)  # type: ignore[no-any-return]


def _slot_of(node: Node, value: Value) -> int:
    return next(slot for slot, operand in node.operands() if operand is value)


# -- samples -----------------------------------------------------------------------------------------------------------


def maps(*, spread: bool = False) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Operands of linear maps of every kind, and the shape of a factor over their six output channels."""
    plane = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 2}
    grouped = {"map.op": "conv", "map.attributes": plane}
    yield {"x": randn(2, 4, 5, 5), "w": randn(6, 2, 3, 3), "b": randn(6), **grouped}, (6, 1, 1)
    yield {"x": randn(3, 5, 4), "w": randn(6, 4), "map.op": "linear"}, (6,)
    if spread:
        turned = {"map.op": "conv_transpose", "map.attributes": {"stride": (2,), "groups": 2}}
        yield {"x": randn(2, 4, 5), "w": randn(4, 3, 3), "b": randn(6), **turned}, (6, 1)
        yield {"x": randn(4, 6), "w": randn(6, 4, 1), "map.op": "conv"}, (6, 1)  # without a batch axis


def weights(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample in float64; all but x are weights."""
    doubled = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in sample.items()}
    return {k: Weight(v) if isinstance(v, torch.Tensor) and k != "x" else v for k, v in doubled.items()}


def _pair_samples() -> Iterable[dict[str, Any]]:
    for sample, shape in maps(spread=True):
        yield weights({**sample, "f": rand(shape) + 0.5})
        yield {**weights(sample), "f": 3.0}
    for op in ("mul", "div"):
        matmul = {"x": randn(2, 3, 4), "w": randn(4, 6), "f": rand(6) + 0.5, "map.op": "matmul", "affine.op": op}
        yield weights(matmul)


def _moved_samples(single: bool = False) -> Iterable[dict[str, Any]]:
    heads = {"layout.op": "reshape", "layout.attributes": {"shape": (3, 5, 2, 3)}}
    turned = {"layout.op": "permute", "layout.attributes": {"dims": (0, 2, 3, 1)}}
    for (sample, _), moved, shape in zip(maps(), (turned, heads), ((6,), (2, 1)), strict=True):
        yield weights({**sample, **moved, **({} if single else {"f": rand(shape) + 0.5})})


def _single_samples() -> Iterable[dict[str, Any]]:
    yield from (weights(sample) for sample, _ in maps(spread=True))


def norm_vectors(count: int) -> dict[str, Any]:
    return {**{name: randn(count) for name in ("gain", "shift", "mean")}, "var": rand(count) + 0.5}


def _norm_samples() -> Iterable[dict[str, Any]]:
    for sample, _ in maps(spread=True):
        if sample["map.op"] != "linear" and sample["x"].ndim > 2:
            yield weights({**sample, **norm_vectors(6)})
    yield weights({"x": randn(3, 4), "w": randn(6, 4), "map.op": "linear", **norm_vectors(6)})
    yield weights({"x": randn(3, 4), "w": randn(4, 6), "map.op": "matmul", **norm_vectors(6)})
    bare = {"x": randn(3, 4), "w": randn(6, 4), "map.op": "linear", "mean": randn(6), "var": rand(6)}
    yield weights(bare)  # without a gain and a shift


def _moved_norm_samples() -> Iterable[dict[str, Any]]:
    turned = {"layout.op": "permute", "layout.attributes": {"dims": (0, 2, 1)}}
    yield weights({"x": randn(2, 5, 4), "w": randn(6, 4), "map.op": "linear", **turned, **norm_vectors(6)})


def _biased_samples() -> Iterable[dict[str, Any]]:
    given = {"x": randn(2, 3, 4), "w": randn(4, 6)}
    for shift in ("add", "sub"):
        yield weights({**given, "t": randn(6), "f": rand(1, 6) + 0.5, "shift.op": shift})
        yield {**weights({**given, "t": randn(6)}), "f": 3, "shift.op": shift}


# -- rules -------------------------------------------------------------------------------------------------------------


def _direct(op: Any, inner: Any) -> Any:
    return inner


def _through(op: Any, inner: Any) -> Any:
    return op.any_of(LAYOUTS, inner, name="layout", attributes=...)


def _patterns(wrap: Wrap) -> dict[str, Callable[..., Any]]:
    def inner(op: Any, x: Any, w: Any, b: Any) -> Any:
        return wrap(op, op.any_of(MAPS, x, w, b, name="map", attributes=...))

    def norm(op, x, w, mean, var, b=None, gain=None, shift=None):  # type: ignore[no-untyped-def]
        vectors = (gain, shift, mean, var)
        return op.batch_norm(inner(op, x, w, b), *vectors, momentum=..., eps=..., name="affine")

    return {
        "scale-or-shift": lambda op, x, w, f, b=None: op.any_of(PAIRS, inner(op, x, w, b), f, name="affine"),
        "difference": lambda op, x, w, f, b=None: op.sub(f, inner(op, x, w, b), name="affine"),
        "negation": lambda op, x, w, b=None: op.neg(inner(op, x, w, b), name="affine"),
        "batch-norm": norm,
    }


def _biased(op: Any, x: Any, w: Any, t: Any, f: Any) -> Any:
    shift = op.any_of(("add", "sub"), op.matmul(x, w, name="map"), t, name="shift")
    return op.any_of(("mul", "div"), shift, f, name="scale")


def _rules() -> Iterator[RewriteRule]:
    def direct(build: Builder, map: Node, affine: Node) -> Value:
        """A scale or a shift behind a linear map goes into its weights."""
        return fold_behind(build, map, affine)

    def moved(build: Builder, map: Node, layout: Node, affine: Node) -> Value:
        """A scale or a shift behind a linear map and a change of layout goes into its weights."""
        return fold_behind(build, map, affine, layout)

    samples = {
        "scale-or-shift": (_pair_samples, _moved_samples),
        "difference": (lambda: (s for s in _pair_samples() if s["map.op"] != "matmul"), _moved_samples),
        "negation": (_single_samples, lambda: _moved_samples(True)),
        "batch-norm": (_norm_samples, _moved_norm_samples),
    }
    for name, pattern in _patterns(_direct).items():
        yield RewriteRule(f"{name}-into-weights", pattern, direct, samples=samples[name][0])
    for name, pattern in _patterns(_through).items():
        yield RewriteRule(f"{name}-through-layout-into-weights", pattern, moved, samples=samples[name][1])
    yield RewriteRule("scale-of-biased-matmul", _biased, scale_biased_matmul, samples=_biased_samples)


RULES = RuleSet(_rules())
