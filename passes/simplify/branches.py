"""Parallel linear branches of one value that are summed become one linear map.

    conv 3x3 (x) + conv 1x1 (x) + batch_norm(x)    conv 3x3 (x)         RepVGG, MobileOne
    conv 13x13 (x) + conv 3x3 dilated by 2 (x)     conv 13x13 (x)       UniRepLKNet: zeros between the entries
    linear(x, w) + s * linear(linear(x, a), b)     linear(x, w + s b a)    LoRA
    linear(x, w) + x                               linear(x, w + 1)

A convolution is a set of taps: entry j of the kernel reads the place ``dilation * j - padding``. Two of them with one
stride are one whose taps are those of both, whatever their paddings and dilations are; a branch without a map is a
kernel of one entry per channel. What would cost more parameters or MACs than it replaces is left alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import rand, randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.rewriting.matcher import Match
from regauge.ir.rewriting.rewrite import RewriteRule, RuleSet, refuse
from regauge.ir.sizes.expressions import same
from regauge.passes.simplify.affine import norm_vectors, weights
from regauge.passes.simplify.affine_steps import PAIRS, affine_of
from regauge.passes.simplify.fixed_values import Fixed, combined, fixed, itself, number, successor
from regauge.passes.simplify.kernels import (
    MATRICES,
    Branch,
    Geometry,
    blocks,
    branch,
    composed,
    from_blocks,
    kernel,
    placed,
)
from regauge.passes.simplify.linear_map import X, axes_of, input_axis, must_pay, own_weight

SUMMED = ("linear", "matmul", "conv")

# -- a branch without a map --------------------------------------------------------------------------------------------


def unit(node: Node, scale: Fixed, shift: Fixed | None) -> Branch:
    """``scale * x + shift`` per channel as a branch beside a linear map: a diagonal, or a kernel of one entry."""
    channels = node.output.shape[input_axis(node)]
    if not isinstance(channels, int) or not same(channels, _input(node).shape[input_axis(node)]):
        return refuse("it changes the number of channels")
    bias = None if shift is None else combined(lambda t: t.expand(channels), shift)
    if node.op in MATRICES:
        return Branch(combined(lambda s: torch.diag(s.expand(channels)), scale), bias=bias)
    rank = node.inputs[1].rank - 2  # type: ignore[union-attr]
    weight = combined(lambda s: s.expand(channels).reshape(channels, 1, *(1,) * rank), scale)
    return Branch(weight, (1,) * rank, Geometry((1,) * rank, (0,) * rank, (1,) * rank, channels), bias)


def _input(node: Node) -> Value:
    x = node.inputs[X]
    assert isinstance(x, Value)
    return x


def _step(build: Builder, node: Node, step: Node) -> Branch:
    """A scale, a shift or a batch norm of the input of a linear map."""
    axes = axes_of(node).operands[X]
    slot = next(slot for slot, value in step.operands() if value is node.inputs[X])
    scale, shift = affine_of(build, step, slot, axes)
    along = [axes[input_axis(node)]]
    return unit(
        node,
        number(1.0) if scale is None else scale.along(along, "the channels"),
        None if shift is None else shift.along(along, "the channels"),
    )


def scaled(build: Builder, found: Branch, step: Node, inner: Node) -> Branch:
    """A branch times or divided by a number."""
    slot = next(slot for slot, value in step.operands() if value is inner.output)
    value = fixed(build, step.inputs[1 - slot])
    other = step.inputs[1 - slot]
    if value is None or (isinstance(other, Value) and math.prod(other.shape) != 1) or (step.op == "div" and slot):
        return refuse("its scale is no number")
    factor = combined(torch.reciprocal if step.op == "div" else torch.clone, value)

    def times(tensor: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return tensor * s.reshape(())

    bias = None if found.bias is None else combined(times, found.bias, factor)
    return Branch(combined(times, found.weight, factor), found.size, found.walk, bias)


# -- sums --------------------------------------------------------------------------------------------------------------


def total(left: Branch, right: Branch) -> Branch:
    """The sum of two branches of one value; refuses where it is no linear map of one operator."""
    biases = [bias for bias in (left.bias, right.bias) if bias is not None]
    bias = None if not biases else biases[0] if len(biases) == 1 else combined(torch.add, *biases)
    if left.walk is None or right.walk is None:
        if left.walk is not right.walk:
            return refuse("a matrix and a kernel have no sum")
        return Branch(combined(torch.add, left.weight, right.weight), bias=bias)
    if left.walk.stride != right.walk.stride:
        return refuse(f"their strides are {left.walk.stride} and {right.walk.stride}")
    groups = math.gcd(left.walk.groups, right.walk.groups)
    sizes, paddings, dilations = zip(*map(_taps, *_taps_of(left), *_taps_of(right)), strict=True)
    walk = Geometry(left.walk.stride, paddings, dilations, groups)
    parts = [_into(part, part.walk, walk, sizes) for part in (left, right) if part.walk is not None]
    weight = combined(lambda *tensors: from_blocks(torch.stack(tensors).sum(0)), *parts)
    return Branch(weight, sizes, walk, bias)


def _taps_of(found: Branch) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    assert found.walk is not None
    return found.size, found.walk.padding, found.walk.dilation


def _taps(
    size: int, padding: int, dilation: int, other: int, other_padding: int, other_dilation: int
) -> tuple[int, int, int]:
    """Size, padding and dilation of the smallest kernel that has the taps of two."""
    start = min(-padding, -other_padding)
    end = max(dilation * (size - 1) - padding, other_dilation * (other - 1) - other_padding)
    steps = [dilation if size > 1 else 0, other_dilation if other > 1 else 0, abs(padding - other_padding)]
    step = math.gcd(*steps) or 1
    return (end - start) // step + 1, -start, step


def _into(found: Branch, own: Geometry, walk: Geometry, sizes: tuple[int, ...]) -> Fixed:
    """The kernel of a branch in blocks of fewer groups, laid into a larger kernel with zeros beside and between."""
    places = []
    for axis, size in enumerate(found.size):
        start = (walk.padding[axis] - own.padding[axis]) // walk.dilation[axis]
        step = own.dilation[axis] // walk.dilation[axis] if size > 1 else 1
        places.append(slice(start, start + (size - 1) * step + 1, step))

    def lay(weight: torch.Tensor) -> torch.Tensor:
        given = blocks(weight, own.groups, walk.groups)
        result = given.new_zeros(*given.shape[:3], *sizes)
        result[(slice(None), slice(None), slice(None), *places)] = given
        return result

    return combined(lay, found.weight)


# -- rules -------------------------------------------------------------------------------------------------------------


def _other(build: Builder, node: Node, match: Match) -> tuple[Branch, Node | None]:
    """The branch beside a linear map, and the node that computes it: none where it is the input itself."""
    found = match.bindings
    if "up" in found:
        up: Node = found["up"]
        product = composed(build, found["down"], up)
        return (scaled(build, product, found["step"], up), found["step"]) if "step" in found else (product, up)
    if "other" in found:
        return branch(build, found["other"]), found["other"]
    if "step" in found:
        return _step(build, node, found["step"]), found["step"]
    return unit(node, number(1.0), None), None


def merge(build: Builder, match: Match) -> Value:
    """Two branches of one value that are summed are one linear map, if it costs no more."""
    node: Node = match["map"]
    beside, last = _other(build, node, match)
    other: Value = _input(node) if last is None else last.output
    if other.dtype != node.output.dtype or other.rank != node.output.rank:
        return refuse("the branches have different types or ranks")
    if not all(map(same, other.shape, node.output.shape)):
        return refuse("the branches have different shapes")
    beside_node = match.bindings.get("other")
    if beside_node is not None and math.prod(beside.size) > math.prod(branch(build, node).size):
        node, beside = beside_node, branch(build, node)
    own_weight(build, node)
    result = placed(build, node, _input(node), total(branch(build, node), beside))
    must_pay(build, [found for found in match.bindings.values() if isinstance(found, Node)])
    return result


def merge_with_rest(build: Builder, match: Match) -> Value:
    """Two branches of one value, summed one after the other with something else, are one linear map."""
    result: Value = build.add(match["rest"], merge(build, match))
    return result


Kind = Callable[[Any, dict[str, Any]], Any]  # the pattern of a branch beside a linear map


def _adapter(op: Any, v: dict[str, Any]) -> Any:
    down = op.any_of(SUMMED, v["x"], v["a"], v["e"], name="down", attributes=...)
    return op.any_of(SUMMED, down, v["v"], v["c"], name="up", attributes=...)


KINDS: dict[str, Kind] = {
    "map": lambda op, v: op.any_of(SUMMED, v["x"], v["v"], v["c"], name="other", attributes=...),
    "identity": lambda op, v: v["x"],
    "step": lambda op, v: op.any_of(PAIRS, v["x"], v["f"], name="step"),
    "batch-norm": lambda op, v: op.batch_norm(
        v["x"], v["gain"], v["shift"], v["mean"], v["var"], momentum=..., eps=..., name="step"
    ),
    "adapter": _adapter,
    "scaled-adapter": lambda op, v: op.any_of(("mul", "div"), _adapter(op, v), v["f"], name="step"),
}


OPTIONAL = ("b", "v", "c", "a", "e", "f", "gain", "shift", "mean", "var")  # what only some kinds of branches read


def _pattern(kind: Kind, rest: bool) -> Callable[..., Any]:
    needed = ("x", "w", "rest") if rest else ("x", "w")

    def pattern(op: Any, *variables: Any) -> Any:
        v = dict(zip((*needed, *OPTIONAL), variables, strict=True))
        left = op.any_of(SUMMED, v["x"], v["w"], v["b"], name="map", attributes=...)
        return op.add(op.add(v["rest"], left) if rest else left, kind(op, v))

    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, either) for name in ("op", *needed)]
    parameters += [inspect.Parameter(name, either, default=None) for name in OPTIONAL]
    pattern.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return pattern


# -- samples -----------------------------------------------------------------------------------------------------------


def _bases() -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """Linear maps that keep the channels, and the shape of a factor over them."""
    grouped = {"map.op": "conv", "map.attributes": {"padding": (1, 1), "groups": 2}}
    yield {"x": randn(2, 6, 5, 4), "w": randn(6, 3, 3, 3), **grouped}, (6, 1, 1)
    yield {"x": randn(2, 6, 7), "w": randn(6, 1, 5), "b": randn(6), "map.op": "conv",
           "map.attributes": {"padding": (4,), "dilation": (2,), "groups": 6}}, (6, 1)  # fmt: skip
    yield {"x": randn(3, 5, 6), "w": randn(6, 6), "b": randn(6), "map.op": "linear"}, (6,)
    yield {"x": randn(3, 6), "w": randn(6, 6), "map.op": "matmul"}, (6,)


def _map_samples() -> Iterator[dict[str, Any]]:
    conv = {"map.op": "conv", "other.op": "conv"}
    strided = {"stride": (2, 1), "groups": 2}
    yield {"x": randn(2, 4, 9, 7), "w": randn(6, 2, 1, 1), "v": randn(6, 2, 3, 3), "c": randn(6), **conv,
           "map.attributes": strided, "other.attributes": {**strided, "padding": (1, 1)}}  # fmt: skip
    wide, sparse = {"padding": (4, 4), "groups": 4}, {"padding": (3, 4), "dilation": (3, 2), "groups": 4}
    yield {"x": randn(1, 4, 9, 9), "w": randn(4, 1, 9, 9), "v": randn(4, 1, 3, 5), "b": randn(4), "c": randn(4),
           **conv, "map.attributes": wide, "other.attributes": sparse}  # fmt: skip
    other = {"padding": (1,), "dilation": (2,), "groups": 2}
    loose = {"map.attributes": {"padding": (1,)}, "other.attributes": other}
    yield {"x": randn(2, 4, 8), "w": randn(4, 4, 3), "v": randn(4, 2, 2), **conv, **loose}
    x, rows, columns, bias = randn(3, 4), randn(5, 4), randn(4, 5), randn(5)
    yield {"x": x, "w": rows, "v": columns, "b": bias, "map.op": "linear", "other.op": "matmul"}
    yield {"x": x, "w": columns, "v": rows, "c": bias, "map.op": "matmul", "other.op": "linear"}


def _step_samples() -> Iterator[dict[str, Any]]:
    for sample, shape in _bases():
        for op in PAIRS:
            yield {**sample, "f": rand(shape) + 0.5, "step.op": op}


def _norm_samples() -> Iterator[dict[str, Any]]:
    yield from ({**sample, **norm_vectors(6)} for sample, _ in _bases() if sample["map.op"] != "linear")


def _adapter_samples() -> Iterator[dict[str, Any]]:
    lines = {"x": randn(3, 4, 8), "w": randn(6, 8), "map.op": "linear"}
    yield {**lines, "a": randn(2, 8), "v": randn(6, 2), "down.op": "linear", "up.op": "linear"}
    yield {**lines, "a": randn(8, 2), "v": randn(2, 6), "b": randn(6), "down.op": "matmul", "up.op": "matmul"}
    walk = {"stride": (2, 2), "padding": (1, 1)}
    convs = {"map.op": "conv", "down.op": "conv", "up.op": "conv", "map.attributes": walk, "down.attributes": walk}
    down, up = {"a": randn(2, 4, 3, 3), "e": randn(2)}, {"v": randn(6, 2, 1, 1)}
    yield {"x": randn(2, 4, 7, 7), "w": randn(6, 4, 3, 3), **down, **up, **convs}


SAMPLES: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
    "map": _map_samples,
    "identity": lambda: (sample for sample, _ in _bases()),
    "step": _step_samples,
    "batch-norm": _norm_samples,
    "adapter": _adapter_samples,
    "scaled-adapter": lambda: (
        {**sample, "f": 0.5, "step.op": op} for sample in _adapter_samples() for op in ("mul", "div")
    ),
}


def _drawn(kind: str, rest: bool) -> Callable[[], Iterator[dict[str, Any]]]:
    def draw() -> Iterator[dict[str, Any]]:
        for sample in SAMPLES[kind]():
            found = weights(sample)
            yield {**found, "rest": torch.tensor(2.5).double()} if rest else found

    return draw


def _embedding_pattern(scaled_by: bool) -> Callable[..., Any]:
    def pattern(op: Any, w: Any, a: Any, v: Any, x: Any, f: Any = None) -> Any:
        down = op.embedding(a, x, padding_idx=..., name="down")
        up = op.any_of(MATRICES, down, v, name="up")
        step = op.any_of(("mul", "div"), up, f, name="step") if scaled_by else up
        return op.add(op.embedding(w, x, padding_idx=..., name="map"), step)

    return pattern


def merge_lookup(build: Builder, match: Match) -> Value:
    """A table and a narrow table behind which a linear map stands, both read at the same places, are one table."""
    node, down, up = match["map"], match["down"], match["up"]
    table, narrow = node.inputs[0], fixed(build, down.inputs[0])
    if not isinstance(table, Parameter) or len(table.uses) > 1 or fixed(build, table) is None:
        return refuse("its table has other readers, or is computed")
    if narrow is None or up.output.dtype != table.dtype or not all(map(same, up.output.shape, node.output.shape)):
        return refuse("the narrow table is computed, or its branch has another type or shape")
    found = Branch(combined(lambda a, v: a @ v.t(), narrow, kernel(build, up)))
    found = scaled(build, found, match["step"], up) if "step" in match.bindings else found
    weight = successor(build, table, combined(torch.add, itself(table), found.weight), table.weight.shape)
    with build.at(node):
        return build.embedding(weight, node.inputs[1], name=node.name, **node.attributes)  # type: ignore[no-any-return]


def _embedding_samples(scaled_by: bool) -> Iterator[dict[str, Any]]:
    places = torch.tensor([[0, 3, 6], [1, 1, 5]])
    for op in ("linear", "matmul"):
        up = randn(4, 2) if op == "linear" else randn(2, 4)
        sample = weights({"w": randn(7, 4), "a": randn(7, 2), "v": up, "up.op": op})
        yield {
            **sample,
            "x": places,
            "down.padding_idx": None,
            "map.padding_idx": 0,
            **({"f": 4.0} if scaled_by else {}),
        }


LOOKUPS = RuleSet(
    RewriteRule(
        f"{name}-beside-embedding", _embedding_pattern(by), merge_lookup, samples=partial(_embedding_samples, by)
    )
    for name, by in (("adapter", False), ("scaled-adapter", True))
)

RULES = RuleSet(
    RewriteRule(f"{kind}-beside-map{'-and-rest' if rest else ''}", _pattern(pattern, rest),
                merge_with_rest if rest else merge, samples=_drawn(kind, rest))
    for kind, pattern in KINDS.items()
    for rest in (False, True)
) + LOOKUPS  # fmt: skip
