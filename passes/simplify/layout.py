"""Steps that regroup and reorder axes: two in a row are one, and what moves nothing but axes of size one is a reshape.

reshape(reshape(x))          reshape(x)             permute(permute(x))     permute(x)
reshape(permute(reshape(x)))                    permute(x), where the reshapes only merge axes and take them apart again
reshape(permute(reshape(x)))                    permute(reshape(x)), where the last one only takes axes apart
mean(permute(x), dims)       permute(mean(x, dims'))
matmul(x, permute(w))        linear(x, w)
linear(flatten(permute(x)))  linear(flatten(x)), with the columns of the weight in another order
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir.dims import unify as algebra
from regauge.ir.dims.extents import ONE, fresh, resolve
from regauge.ir.dtypes import is_real
from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.rewriting.matcher import Match
from regauge.ir.rewriting.pattern_instances import Weight
from regauge.ir.rewriting.rewrite import RuleSet, differs, refuse, rule
from regauge.ir.sizes.expressions import Size, product, same

Sample = dict[str, Any]
REGROUPING = ("reshape", "squeeze", "unsqueeze")  # entries stay in their row-major order

# -- reshapes ----------------------------------------------------------------------------------------------------------


def ones_left_out(long: Sequence[Size], short: Sequence[Size]) -> tuple[int, ...] | None:
    """The axes of size one of ``long`` without which it is ``short``; None where there are none such."""
    dropped: list[int] = []
    at = 0
    for axis, size in enumerate(long):
        if at < len(short) and same(size, short[at]):
            at += 1
        elif same(size, 1):
            dropped.append(axis)
        else:
            return None
    return tuple(dropped) if at == len(short) else None


def regrouped(build: Builder, x: Value, shape: Sequence[Size]) -> Value:
    """``x`` in another shape, by the step that says most about it: none, squeeze, unsqueeze, else reshape."""
    if len(shape) == x.rank and all(map(same, shape, x.shape)):
        return x
    gone = ones_left_out(x.shape, shape)
    if gone:
        return build.squeeze(x, dims=gone)  # type: ignore[no-any-return]
    new = ones_left_out(shape, x.shape)
    if new and len(new) == 1:
        return build.unsqueeze(x, dim=new[0])  # type: ignore[no-any-return]
    return build.reshape(x, shape=tuple(shape))  # type: ignore[no-any-return]


def dynamic_sizes(shape: Sequence[Size]) -> int:
    return sum(not isinstance(size, int) for size in shape)


def _regrouping_samples() -> Iterable[Sample]:
    def sample(outer: str, attributes: Sample, inner: str, inner_attributes: Sample) -> Sample:
        x = randn(2, 1, 6).double()
        return {"x": x, "outer.op": outer, "outer.attributes": attributes,
                "inner.op": inner, "inner.attributes": inner_attributes}  # fmt: skip

    yield sample("reshape", {"shape": (4, 3)}, "reshape", {"shape": (2, 2, 3)})
    yield sample("reshape", {"shape": (2, 1, 6)}, "reshape", {"shape": (12,)})
    yield sample("squeeze", {"dims": (1,)}, "reshape", {"shape": (3, 1, 4)})
    yield sample("unsqueeze", {"dim": -1}, "reshape", {"shape": (3, 4)})
    yield sample("reshape", {"shape": (2, 6)}, "unsqueeze", {"dim": 0})
    yield sample("squeeze", {"dims": (1, 2)}, "unsqueeze", {"dim": 2})
    yield sample("unsqueeze", {"dim": 1}, "squeeze", {"dims": (1,)})


@rule(
    lambda op, x: op.any_of(
        REGROUPING, op.any_of(REGROUPING, x, attributes=..., name="inner"), attributes=..., name="outer"
    ),
    samples=_regrouping_samples,
    shared=True,
)
def reshape_of_reshape(build: Builder, x: Value, inner: Node, outer: Node, match: Match) -> Value:
    """Reshape, squeeze and unsqueeze: of two in a row only the last shape counts."""
    result = regrouped(build, x, outer.output.shape)
    reshape = result is not x and build.added[-1].op == "reshape"
    if reshape and "reshape" not in (inner.op, outer.op):
        return differs("two axes of size one would be one reshape of all axes")
    if reshape and outer.op != "reshape" and not match.read_once(inner.output):
        return refuse(f"{inner.name} has other readers")
    return result


# -- permutes ----------------------------------------------------------------------------------------------------------


def positive_dims(node: Node) -> tuple[int, ...]:
    """The axes of a permute, counted from the front."""
    dims = node.attributes["dims"]
    return tuple(dim % len(dims) for dim in dims)


def permuted(build: Builder, x: Value, dims: Sequence[int]) -> Value:
    """``x`` with its axes in another order; no node where that is the order they have."""
    return x if tuple(dims) == tuple(range(x.rank)) else build.permute(x, dims=tuple(dims))


def _permute_samples() -> Iterable[Sample]:
    yield {"x": randn(2, 3, 4).double(), "outer.dims": (1, 2, 0), "inner.dims": (0, 2, 1)}
    yield {"x": randn(2, 3, 4).double(), "outer.dims": (0, -1, 1), "inner.dims": (0, 2, 1)}


@rule(
    lambda op, x: op.permute(op.permute(x, dims=..., name="inner"), dims=..., name="outer"),
    samples=_permute_samples,
    shared=True,
)
def permute_of_permute(build: Builder, x: Value, inner: Node, outer: Node) -> Value:
    """Two orders in a row are one order."""
    first = positive_dims(inner)
    return permuted(build, x, [first[dim] for dim in positive_dims(outer)])


def _ones_samples() -> Iterable[Sample]:
    yield {"x": randn(2, 1, 4).double(), "p.dims": (1, 0, 2), "outer.op": "squeeze", "outer.attributes": {"dims": (0,)}}
    yield {"x": randn(2, 1, 4).double(), "p.dims": (1, 0, 2), "outer.op": "unsqueeze", "outer.attributes": {"dim": 3}}
    yield {"x": randn(2, 1, 4, 1).double(), "p.dims": (0, 2, 3, 1), "outer.op": "reshape",
           "outer.attributes": {"shape": (8, 1)}}  # fmt: skip


def _moves_only_ones(node: Node) -> bool:
    x = node.inputs[0]
    assert isinstance(x, Value)
    moved = [dim for dim in positive_dims(node) if not same(x.shape[dim], 1)]
    return moved == sorted(moved)


@rule(
    lambda op, x: op.any_of(REGROUPING, op.permute(x, dims=..., name="p"), attributes=..., name="outer"),
    samples=_ones_samples,
)
def reshape_of_permuted_ones(build: Builder, x: Value, p: Node, outer: Node) -> Value:
    """A permute that only moves axes of size one, before a reshape, is part of it."""
    if not _moves_only_ones(p):
        return differs("its permute moves entries")
    return _only_if_plain(regrouped(build, x, outer.output.shape), outer)


@rule(
    lambda op, x: op.permute(op.any_of(REGROUPING, x, attributes=..., name="inner"), dims=..., name="p"),
    samples=lambda: [
        {"x": randn(2, 4).double(), "p.dims": (1, 0, 2), "inner.op": "unsqueeze", "inner.attributes": {"dim": 1}},
        {"x": randn(2, 4).double(), "p.dims": (0, 1, 3, 2), "inner.op": "reshape",
         "inner.attributes": {"shape": (2, 2, 1, 2)}},
    ],
)  # fmt: skip
def permuted_ones_of_reshape(build: Builder, x: Value, inner: Node, p: Node) -> Value:
    """A permute that only moves axes of size one, after a reshape, is part of it."""
    if not _moves_only_ones(p):
        return differs("its permute moves entries")
    return _only_if_plain(regrouped(build, x, p.output.shape), inner)


def _follows_permute(x: Value) -> bool:
    """Whether a value is a piece of a permuted one, or the same in another shape."""
    node = x.producer
    while node is not None and node.op in (*REGROUPING, "select", "split", "slice"):
        source = node.inputs[0]
        node = source.producer if isinstance(source, Value) else None
    return node is not None and node.op == "permute" and node is not x.producer


def _confined_samples() -> Iterable[Sample]:
    def sample(shape: tuple[int, ...], inner: tuple[str, Sample], dims: Any, outer: tuple[str, Sample]) -> Sample:
        return {"x": randn(shape).double(), "p.dims": dims, "inner.op": inner[0], "inner.attributes": inner[1],
                "outer.op": outer[0], "outer.attributes": outer[1]}  # fmt: skip

    def shaped(*shape: int) -> tuple[str, Sample]:
        return "reshape", {"shape": shape}

    yield sample((2, 4, 3, 5), shaped(8, 3, 5), (0, 2, 1), shaped(2, 4, 5, 3))
    yield sample((2, 3, 4, 5), shaped(6, 20), (1, 0), shaped(4, 5, 2, 3))
    yield sample((1, 4, 3, 1, 5), shaped(4, 3, 5), (0, 2, 1), shaped(1, 4, 5, 1, 3))
    yield sample((2, 4, 3), shaped(1, 8, 3), (2, 0, 1), shaped(3, 1, 2, 4, 1))
    yield sample((2, 3), ("unsqueeze", {"dim": 0}), (0, 2, 1), ("squeeze", {"dims": (0,)}))
    yield sample((2, 3, 1), ("squeeze", {"dims": (2,)}), (1, 0), ("unsqueeze", {"dim": 0}))


@rule(
    lambda op, x: op.any_of(
        REGROUPING,
        op.permute(op.any_of(REGROUPING, x, attributes=..., name="inner"), dims=..., name="p"),
        attributes=...,
        name="outer",
    ),
    samples=_confined_samples,
)
def permute_of_regrouped(build: Builder, x: Value, inner: Node, p: Node, outer: Node) -> Value:
    """A permute between two reshapes that only merge axes and take them apart again is a permute of the axes.

    Not behind pieces of a permuted value, with which onnxruntime joins it: measured, the keys of a fused projection
    are then copied entry by entry, where their product would read them as they are.
    """
    if _follows_permute(x):
        return refuse("a runtime would join it with the permute before its pieces, which is slow")
    own = [fresh(size) for size in x.shape]
    middle = algebra.reshape(own, inner.output.shape)
    last = [resolve(axis) for axis in algebra.reshape([middle[d] for d in positive_dims(p)], outer.output.shape)]
    order = [own.index(axis) for axis in last if axis is not ONE and axis in own]
    ones = [axis for axis, extent in enumerate(own) if extent is ONE]
    if len(set(order)) + len(ones) < x.rank or len(order) + last.count(ONE) < len(last):
        return differs("its axes are cut and laid out anew")
    if len(ones) == last.count(ONE):
        where, others = iter(ones), iter(order)
        return permuted(build, x, [next(where) if axis is ONE else next(others) for axis in last])
    return regrouped(build, permuted(build, x, [*ones, *order]), outer.output.shape)


def _apart_samples() -> Iterable[Sample]:
    x = randn(2, 4, 3, 5).double()
    yield {"x": x, "inner.shape": (8, 3, 5), "p.dims": (0, 2, 1), "outer.shape": (4, 2, 5, 3)}
    yield {"x": x, "inner.shape": (24, 5), "p.dims": (1, 0), "outer.shape": (5, 3, 1, 8)}


def _runs(sizes: Sequence[Size], shape: Sequence[Size]) -> list[Sequence[Size]] | None:
    """Of which sizes in a row of ``shape`` each size is the product; None where some are of none."""
    runs, start = [], 0
    for size in sizes:
        end = start
        while end < len(shape) and (end == start or not same(product(shape[start:end]), size)):
            end += 1
        runs.append(shape[start:end])
        start = end
    fits = all(same(product(run), size) for run, size in zip(runs, sizes, strict=True))
    return runs if fits and start == len(shape) else None


@rule(
    lambda op, x: op.reshape(
        op.permute(op.reshape(x, shape=..., name="inner"), dims=..., name="p"), shape=..., name="outer"
    ),
    samples=_apart_samples,
)
def reshapes_around_permute(build: Builder, x: Value, inner: Node, p: Node, outer: Node) -> Value:
    """Axes that are taken apart after a permute, behind a reshape, are taken apart by that one."""
    runs = _runs(p.output.shape, outer.output.shape)
    if runs is None or dynamic_sizes(outer.output.shape) > 1:
        return differs("its last reshape merges axes")
    dims = positive_dims(p)
    ordered = [runs[dims.index(axis)] for axis in range(len(dims))]
    starts = [sum(map(len, ordered[:axis])) for axis in range(len(dims))]
    with build.at(inner):
        apart = regrouped(build, x, [size for run in ordered for size in run])
    with build.at(p):
        return permuted(build, apart, [starts[dim] + place for dim in dims for place in range(len(ordered[dim]))])


def _only_if_plain(result: Value, neighbour: Node) -> Value:
    """Refuses where a reshape would need several dynamic sizes that nothing needed before."""
    made = result.producer
    if made is not None and made.op == "reshape" and neighbour.op != "reshape" and dynamic_sizes(result.shape) > 1:
        return refuse("a reshape would need several dynamic sizes")
    return result


# -- reductions --------------------------------------------------------------------------------------------------------

REDUCTIONS = ("mean", "sum", "prod", "amax", "amin", "any", "all", "logsumexp", "var", "std", "vector_norm")


def _reduction_samples() -> Iterable[Sample]:
    for op in REDUCTIONS:
        x = randn(2, 3, 4).double() if op not in ("any", "all") else randn(2, 3, 4) > 0
        yield {"x": x, "reduce.op": op, "p.dims": (2, 0, 1), "reduce.attributes": {"dims": (0, -1), "keepdim": False}}
    x = randn(2, 3, 4, 5).double()
    for attributes in ({"dims": (1, 2), "keepdim": True}, {"dims": (1,), "keepdim": False}, {"dims": None}):
        yield {"x": x, "reduce.op": "mean", "p.dims": (0, 3, 1, 2), "reduce.attributes": attributes}
    yield {"x": x, "reduce.op": "var", "p.dims": (3, 2, 1, 0), "reduce.attributes": {"dims": (3,), "correction": 0}}


@rule(
    lambda op, x: op.any_of(REDUCTIONS, op.permute(x, dims=..., name="p"), attributes=..., name="reduce"),
    samples=_reduction_samples,
    shared=True,
)
def reduction_of_permute(build: Builder, x: Value, p: Node, reduce: Node, match: Match) -> Value:
    """A reduction finds its axes in the order before; what is left is permuted afterwards, where it must be at all."""
    order, given = positive_dims(p), reduce.attributes["dims"]
    gone = {dim % len(order) for dim in given} if given else set(range(len(order)))
    found: Value = build(
        reduce.op, x, **{**reduce.attributes, "dims": tuple(sorted(order[dim] for dim in gone)) if given else given}
    )
    if reduce.attributes["keepdim"]:
        moved = [order[dim] for dim in range(len(order)) if dim not in gone]
        result = found if _in_order(order, gone) and moved == sorted(moved) else permuted(build, found, order)
    else:
        kept = sorted(order[dim] for dim in range(len(order)) if dim not in gone)
        result = permuted(build, found, [kept.index(order[dim]) for dim in range(len(order)) if dim not in gone])
    if result is not found and not match.read_once(p.output):
        return refuse(f"{p.name} has other readers")
    return result


def _in_order(order: Sequence[int], gone: set[int]) -> bool:
    """Whether the axes of size one stand where they stood."""
    return all(order[dim] in gone for dim in gone)


# -- products with weights ---------------------------------------------------------------------------------------------


@rule(
    lambda op, x, w: op.matmul(x, op.permute(w, dims=..., name="p")),
    samples=lambda: [
        {"x": randn(2, 5, 3).double(), "w": Weight(randn(4, 3).double()), "p.dims": (1, 0)},
        {"x": randn(3).double(), "w": randn(4, 3).double(), "p.dims": (-1, 0)},
    ],
    shared=True,
)
def matmul_of_transposed(build: Builder, x: Value, w: Value, p: Node, match: Match) -> Value:
    """matmul(x, w') is linear(x, w): the weight stays as it is stored."""
    if w.rank != 2 or positive_dims(p) != (1, 0) or not is_real(w.dtype):
        return differs("its second operand is no transposed matrix")
    own = isinstance(w, Parameter) and len(w.uses) == 1 and match.read_once(p.output)
    if p.origin is not None and x.rank != 2 and not own:
        return differs("a file would say it the same way, with a Transpose of a weight that others read")
    return build.linear(x, w)  # type: ignore[no-any-return]


def _flattened_samples() -> Iterable[Sample]:
    x, w = randn(2, 3, 4, 5).double(), Weight(randn(7, 60).double())
    yield {"x": x, "w": w, "p.dims": (0, 2, 3, 1), "flat.shape": (2, 60)}
    yield {"x": x, "w": w, "b": Weight(randn(7).double()), "p.dims": (0, 3, 1, 2), "flat.shape": (2, 60)}
    yield {"x": x, "w": Weight(randn(7, 20).double()), "p.dims": (0, 1, 3, 2), "flat.shape": (2, 3, 20)}


@rule(
    lambda op, x, w, b=None: op.linear(
        op.reshape(op.permute(x, dims=..., name="p"), shape=..., name="flat"), w, b, name="linear"
    ),
    samples=_flattened_samples,
)
def flattened_permute_into_weight(
    build: Builder, x: Value, w: Value, b: Value | None, p: Node, flat: Node, linear: Node
) -> Value:
    """A linear map of axes that were permuted and flattened reads them unpermuted, its columns put in their order."""
    if not isinstance(w, Parameter) or len(w.uses) > 1:
        return refuse("its weight is computed or has other readers")
    order, shape = positive_dims(p), flat.output.shape
    lead = len(shape) - 1
    sizes = p.output.shape[lead:]
    if order[:lead] != tuple(range(lead)) or not all(map(same, shape[:lead], p.output.shape)):
        return differs("it is no flattening of the last axes")
    if not all(isinstance(size, int) for size in sizes) or not same(product(sizes), shape[-1]):
        return refuse("it is no flattening of axes of fixed sizes")
    back = [1 + list(order[lead:]).index(axis) for axis in range(lead, len(order))]
    widths = [int(size) for size in sizes]

    def reordered(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1, *widths).permute(0, *back).reshape(-1, math.prod(widths))

    x = regrouped(build, x, shape)
    with build.at(linear):
        return build("linear", x, build.folded(w, reordered), b, name=linear.name)  # type: ignore[no-any-return]


RULES = RuleSet(
    [
        reshape_of_reshape, permute_of_permute, reshape_of_permuted_ones, permuted_ones_of_reshape,
        permute_of_regrouped, reshapes_around_permute, reduction_of_permute, matmul_of_transposed,
        flattened_permute_into_weight,
    ]
)  # fmt: skip
