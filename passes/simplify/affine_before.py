"""Scales and shifts before a linear map, folded into its weights.

    batch_norm -> conv(w, b)     conv(x, w', b')
    mul(x, s) -> linear(w, b)    linear(x, w', b)
    add(x, t) -> linear(w, b)    linear(x, w, b')

They run along the axis that the map contracts. A shift is never moved through zero padding, whose zeros would miss it,
nor through a transposed convolution, which does not reach every place alike. A step that several maps read goes into
all of them or into none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import rand, randn

from regauge.ir.dims.extents import fresh
from regauge.ir.dims.local_axes import LocalAxes
from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.rewriting.matcher import Match, match
from regauge.ir.rewriting.pattern_instances import Weight
from regauge.ir.rewriting.rewrite import RewriteRule, RuleSet, Samples, refuse
from regauge.passes.simplify.affine import norm_vectors, weights
from regauge.passes.simplify.affine_steps import PAIRS, Affine, affine_of, moving_slot
from regauge.passes.simplify.assemble_norms import FROM_MEANS
from regauge.passes.simplify.fixed_values import combined, itself, successor
from regauge.passes.simplify.linear_map import (
    LAYOUTS,
    MAPS,
    W,
    X,
    axes_of,
    has_zero_padding,
    old_bias,
    own_weight,
    placed_bias,
    rebuilt,
)

TAKE_SHIFTS = ("linear", "conv")  # maps that do the same everywhere, and have a bias


def fold_before(build: Builder, affine: Node, map: Node, layout: Node | None = None) -> Value:
    """``w (s x + t) + b`` is ``(w s) x + (w t + b)``, with what stands between."""
    step, axes = _step(build, affine, map, layout)
    weight = own_weight(build, map)
    bias: Operand = map.inputs[2] if len(map.inputs) > 2 else None
    if step.shift is not None:
        shifted = combined(torch.mul, itself(weight), step.shift.along(axes.operands[W], "the input channels"))
        spread = combined(lambda t: t.sum(tuple(range(1, t.dim()))), shifted)
        bias = placed_bias(build, map, combined(torch.add, old_bias(map), spread))
    new = weight
    if step.scale is not None:
        factors = step.scale.along(axes.operands[W], "the input channels")
        new = successor(build, weight, combined(torch.mul, itself(weight), factors))
    x = affine.inputs[moving_slot(build, affine)]
    if layout is not None:
        with build.at(layout):
            x = build(layout.op, x, *layout.inputs[1:], **layout.attributes)
    return rebuilt(build, map, new, bias, x)


def _step(build: Builder, affine: Node, map: Node, layout: Node | None) -> tuple[Affine, LocalAxes]:
    """What a step does along the axes of a map behind it; refuses where the map cannot take it over."""
    own_weight(build, map)
    seen = [fresh(size) for size in affine.output.shape]
    axes = axes_of(map, seen if layout is None else axes_of(layout, seen).results[0])
    slot = moving_slot(build, affine)
    if affine.op in PAIRS and ends_norm(affine.output):
        return refuse("it is the gain or the shift of a norm, which runtimes know by them")
    step = affine_of(build, affine, slot, seen)
    for part in step:
        if part is not None:
            part.along(axes.operands[W], "the input channels")
    if step.shift is not None and has_zero_padding(map):
        return refuse("a shift is not moved through zero padding")
    if step.shift is not None and map.op not in TAKE_SHIFTS:
        return refuse(f"a shift is not moved through a {map.op}")
    return step, axes


def ends_norm(value: Value) -> bool:
    """Whether a value is a norm written in primitive operators, with its gain and shift as far as they go.

    Runtimes recognise a norm by its gain and run all of it at once, which saves more than the gain costs.
    """
    node = value.producer
    while node is not None and (node.op == "cast" or (node.op in PAIRS and any(map(_is_weight, node.inputs)))):
        moving = next((operand for _, operand in node.operands() if not _is_weight(operand)), None)
        node = None if moving is None else moving.producer
    return node is not None and any(isinstance(match(rule.pattern, node, shared=True), Match) for rule in FROM_MEANS)


def _is_weight(operand: Operand) -> bool:
    return isinstance(operand, Parameter)


def fold_into_all(build: Builder, affine: Node, map: Node) -> Value:
    """Fold a step into a map, where all that read the step can take it over as well."""
    if affine.output in build.held:
        return refuse(f"{affine.output} is an output too")
    for reader, slot in affine.output.uses:
        if reader.op not in MAPS or slot != X:
            return refuse(f"{reader.label} reads it too, and cannot take it over")
        _step(build, affine, reader, None)
    return fold_before(build, affine, map)


# -- samples -----------------------------------------------------------------------------------------------------------


def _maps() -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Operands of maps of every kind, and the shape of a factor over their input channels."""
    padded = {"padding": (1, 1), "groups": 2}
    yield {"x": randn(2, 4, 5, 5), "w": randn(6, 2, 3, 3), "map.op": "conv", "map.attributes": padded}, (4, 1, 1)
    yield {"x": randn(4, 5), "w": randn(6, 4, 2), "b": randn(6), "map.op": "conv"}, (4, 1)
    yield {"x": randn(3, 5, 4), "w": randn(6, 4), "b": randn(6), "map.op": "linear"}, (4,)
    yield {"x": randn(3, 5, 4), "w": randn(6, 4), "map.op": "linear"}, (1, 4)
    yield {"x": randn(3, 5, 4), "w": randn(4, 6), "map.op": "matmul"}, (4,)
    turned = {"stride": (2,), "groups": 2}
    turned_sample = {"x": randn(2, 4, 5), "w": randn(4, 3, 3), "map.op": "conv_transpose", "map.attributes": turned}
    yield turned_sample, (1, 4, 1)


def _takes_shifts(sample: dict[str, Any]) -> bool:
    return sample["map.op"] in TAKE_SHIFTS and "padding" not in sample.get("map.attributes", {})


def _pair_samples() -> Iterable[dict[str, Any]]:
    for sample, shape in _maps():
        for op in PAIRS if _takes_shifts(sample) else ("mul", "div"):
            yield weights({**sample, "f": rand(shape) + 0.5, "affine.op": op})
        yield {**weights(sample), "f": 3.0, "affine.op": "div"}
    for sample, shape in filter(lambda entry: _takes_shifts(entry[0]), _maps()):  # f - x
        flipped = {**sample, "f": sample["x"], "x": rand(shape), "affine.op": "sub"}
        yield {**weights(flipped), "x": Weight(flipped["x"].double()), "f": flipped["f"].double()}


def _single_samples() -> Iterable[dict[str, Any]]:
    return (weights(sample) for sample, _ in _maps())


def _norm_samples() -> Iterable[dict[str, Any]]:
    yield weights(
        {
            "x": randn(2, 4, 5, 5),
            "w": randn(6, 2, 3, 3),
            "map.op": "conv",
            **norm_vectors(4),
            "map.attributes": {"groups": 2},
        }
    )
    yield weights({"x": randn(3, 4), "w": randn(6, 4), "map.op": "linear", **norm_vectors(4)})


def _moved(vectors: Callable[[int], dict[str, Any]]) -> Iterable[dict[str, Any]]:
    flat = {"layout.op": "reshape", "layout.attributes": {"shape": (2, 36)}, "map.op": "linear"}
    turned = {"layout.op": "permute", "layout.attributes": {"dims": (0, 1, 3, 2)}, "map.op": "conv"}
    yield weights({"x": randn(2, 4, 3, 3), "w": randn(5, 36), **flat, **vectors(4)})
    yield weights({"x": randn(2, 4, 3, 5), "w": randn(6, 4, 2, 2), "b": randn(6), **turned, **vectors(4)})


def _moved_pair_samples() -> Iterable[dict[str, Any]]:
    for op in PAIRS:
        samples = _moved(lambda channels: {"f": rand(channels, 1, 1) + 0.5})
        yield from ({**sample, "affine.op": op} for sample in samples)
    yield from ({**weights({"f": rand(4) + 0.5}), **sample, "affine.op": "div"} for sample in _scaled_samples())


def _moved_single_samples() -> Iterable[dict[str, Any]]:
    yield from _moved(lambda _: {})
    yield from _scaled_samples()


def _scaled_samples() -> Iterable[dict[str, Any]]:
    """Maps that take a scale and no shift, behind a permutation that brings the last axis to the input channels."""
    turned = {"x": randn(2, 3, 4), "layout.op": "permute", "layout.attributes": {"dims": (0, 2, 1)}}
    yield weights({**turned, "w": randn(4, 5, 2), "map.op": "conv_transpose"})
    yield weights({**turned, "layout.attributes": {"dims": (1, 0, 2)}, "w": randn(4, 5), "map.op": "matmul"})


# -- rules -------------------------------------------------------------------------------------------------------------


def _direct(op: Any, ops: Sequence[str], step: Any, w: Any, b: Any) -> Any:
    return op.any_of(ops, step, w, b, name="map", attributes=...)


def _through(op: Any, ops: Sequence[str], step: Any, w: Any, b: Any) -> Any:
    return _direct(op, ops, op.any_of(LAYOUTS, step, name="layout", attributes=...), w, b)


def _patterns(then: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    def norm(op, x, w, mean, var, b=None, gain=None, shift=None):  # type: ignore[no-untyped-def]
        step = op.batch_norm(x, gain, shift, mean, var, momentum=..., eps=..., name="affine")
        return then(op, TAKE_SHIFTS, step, w, b)

    return {
        "scale-or-shift": lambda op, x, f, w, b=None: then(op, MAPS, op.any_of(PAIRS, x, f, name="affine"), w, b),
        "negation": lambda op, x, w, b=None: then(op, MAPS, op.neg(x, name="affine"), w, b),
        "batch-norm": norm,
    }


def _rules() -> Iterator[RewriteRule]:
    def direct(build: Builder, affine: Node, map: Node) -> Value:
        """A scale or a shift before linear maps goes into their weights."""
        return fold_into_all(build, affine, map)

    def moved(build: Builder, affine: Node, layout: Node, map: Node) -> Value:
        """A scale or a shift before a change of layout and a linear map goes into its weights."""
        return fold_before(build, affine, map, layout)

    samples: dict[str, tuple[Samples, Samples]] = {
        "scale-or-shift": (_pair_samples, _moved_pair_samples),
        "negation": (_single_samples, _moved_single_samples),
        "batch-norm": (_norm_samples, lambda: _moved(norm_vectors)),
    }
    for name, pattern in _patterns(_direct).items():
        yield RewriteRule(f"{name}-before-map", pattern, direct, samples=samples[name][0], shared=True)
    for name, pattern in _patterns(_through).items():
        yield RewriteRule(f"{name}-before-layout-and-map", pattern, moved, samples=samples[name][1])


RULES = RuleSet(_rules())
