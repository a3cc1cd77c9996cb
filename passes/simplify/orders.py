"""Rows in another order: what gives fewer numbers is what is put in order.

permute(embedding(w, x))             embedding(w, permute(x))
linear(permute(x), w)                permute(linear(x, w)), where it gives no more numbers than it reads
gather_nd(x, positions of all of x)  reshape(x)
reshape(expand(unsqueeze(x)))        repeat_interleave(x)
reshape(permute(reshape(x)))         shuffle(x), where two parts of one axis change places
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import randint, randn

from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Operand, Parameter, Value
from regauge.ir.rewriting.pattern_instances import Constant, Weight
from regauge.ir.rewriting.rewrite import RuleSet, differs, refuse, rule
from regauge.ir.sizes.expressions import at_least, same
from regauge.passes.simplify.layout import permuted, positive_dims, regrouped


def _orders_rows(p: Node) -> tuple[int, ...]:
    """The order of the leading axes of a permute that leaves the last one where it is."""
    *order, last = positive_dims(p)
    return tuple(order) if last == len(order) else differs("it moves the last axis too")


def _table_samples() -> Iterator[dict[str, Any]]:
    table = Weight(randn(7, 4).double())
    yield {"w": table, "x": randint(0, 7, (2, 3)), "p.dims": (1, 0, 2)}
    yield {"w": table, "x": randint(0, 7, (2, 3, 5)), "p.dims": (2, 0, 1, -1)}


@rule(
    lambda op, w, x: op.permute(op.embedding(w, x, attributes=..., name="table"), dims=..., name="p"),
    samples=_table_samples,
)
def permuted_embedding(build: Builder, w: Value, x: Value, table: Node, p: Node) -> Value:
    """What a table gives for positions in another order: one number is moved per row, not all of the row."""
    ordered = permuted(build, x, _orders_rows(p))
    with build.at(table):
        return build.embedding(w, ordered, **table.attributes)  # type: ignore[no-any-return]


def _map_samples() -> Iterator[dict[str, Any]]:
    x, w = randn(2, 3, 6).double(), Weight(randn(4, 6).double())
    yield {"x": x, "w": w, "p.dims": (1, 0, 2)}
    yield {"x": x, "w": w, "b": Weight(randn(4).double()), "p.dims": (-2, 0, -1)}


@rule(
    lambda op, x, w, b=None: op.linear(op.permute(x, dims=..., name="p"), w, b, name="map"),
    samples=_map_samples,
)
def linear_of_ordered(build: Builder, x: Value, w: Value, b: Operand, p: Node, map: Node) -> Value:  # noqa: A002
    """A linear map of rows in another order gives its rows in that order, which are no longer than those it reads."""
    order = _orders_rows(p)
    if not at_least(x.shape[-1], w.shape[0]):
        return refuse("its results are more numbers than its operand")
    with build.at(map):
        rows = build.linear(x, w, b)
    with build.at(p):
        return permuted(build, rows, (*order, len(order)))


def _positions(*shape: int) -> torch.Tensor:
    return torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), -1)


def _position_samples() -> Iterator[dict[str, Any]]:
    x = randn(2, 3, 4).double()
    yield {"x": x, "at": Constant(_positions(2, 3).reshape(2, 1, 1, 3, 2))}
    yield {"x": x, "at": Constant(_positions(2, 3, 4).reshape(6, 4, 3))}
    yield {"x": x, "at": Constant(torch.arange(2)[:, None])}


@rule(lambda op, x, at: op.gather_nd(x, at, batch_dims=0), samples=_position_samples)
def gathered_in_order(build: Builder, x: Value, at: Operand) -> Value:
    """What lies at all positions, one after the other, is the value itself in another shape."""
    if not isinstance(at, Parameter) or at.kind != "constant":
        return differs("its positions are computed")
    result, depth = [*at.shape[:-1], *x.shape[int(at.weight.shape[-1]) :]], int(at.weight.shape[-1])
    sizes = [size for size in x.shape[:depth] if isinstance(size, int)]
    if len(sizes) < depth or math.prod(sizes) != math.prod(at.weight.shape[:-1]):
        return differs("it takes some of the entries")
    if not torch.equal(at.tensor.reshape(-1, depth), _positions(*sizes).reshape(-1, depth).to(at.tensor)):
        return differs("it takes them in another order")
    return regrouped(build, x, result)


def _copy_samples() -> Iterator[dict[str, Any]]:
    yield {"x": randn(2, 3, 4).double(), "u": 2, "e.shape": (2, 3, 5, 4), "r.shape": (2, 15, 4)}
    yield {"x": randn(2, 3).double(), "u": -1, "e.shape": (2, 3, 2), "r.shape": (2, 6)}


@rule(
    lambda op, x, u: op.reshape(op.expand(op.unsqueeze(x, dim=u), shape=..., name="e"), shape=..., name="r"),
    samples=_copy_samples,
)
def copies_side_by_side(build: Builder, x: Value, u: int, e: Node, r: Node) -> Value:
    """Entries that are expanded along an axis of their own, and joined with it, are repeated one by one."""
    axis = u % (x.rank + 1)
    copies = e.output.shape[axis] if e.output.rank == x.rank + 1 else None
    if axis == 0 or not isinstance(copies, int):
        return differs("it repeats the whole")
    shape = [size * copies if place == axis - 1 else size for place, size in enumerate(x.shape)]
    if len(shape) != r.output.rank or not all(map(same, shape, r.output.shape)):
        return differs("its copies are joined with other axes")
    kept = [size for place, size in enumerate(e.output.shape) if place != axis]
    if not all(map(same, kept, x.shape)):
        return differs("other axes are expanded too")
    return build.repeat_interleave(x, repeats=copies, dim=axis - 1)  # type: ignore[no-any-return]


def _shuffle_samples() -> Iterator[dict[str, Any]]:
    yield {"x": randn(2, 6, 4).double(), "i.shape": (2, 2, 3, 4), "p.dims": (0, 2, 1, 3), "o.shape": (2, 6, 4)}
    yield {"x": randn(6, 4).double(), "i.shape": (3, 2, 4), "p.dims": (1, 0, -1), "o.shape": (6, 4)}


@rule(
    lambda op, x: op.reshape(op.permute(op.reshape(x, shape=..., name="i"), dims=..., name="p"), shape=..., name="o"),
    samples=_shuffle_samples,
)
def shuffled(build: Builder, x: Value, i: Node, p: Node, o: Node) -> Value:
    """Channels that are taken apart into groups, exchanged with them and joined again are shuffled."""
    order, apart = positive_dims(p), i.output.shape
    moved = [place for place, axis in enumerate(order) if place != axis]
    if len(moved) != 2 or moved[1] != moved[0] + 1 or len(apart) != x.rank + 1:
        return differs("it moves more than two parts of one axis")
    axis = moved[0]
    joined = [*apart[:axis], apart[axis] * apart[axis + 1], *apart[axis + 2 :]]
    if o.output.rank != x.rank or not all(map(same, joined, x.shape)) or not all(map(same, o.output.shape, x.shape)):
        return differs("its axes are joined in another way")
    if not isinstance(groups := apart[axis], int):
        return differs("it has a dynamic number of groups")
    return build.shuffle(x, groups=groups, dim=axis)  # type: ignore[no-any-return]


RULES = RuleSet([permuted_embedding, linear_of_ordered, gathered_in_order, copies_side_by_side, shuffled])
