"""Scatter: writing entries at computed places of one axis. That axis keeps its indices; the others are carried."""

from __future__ import annotations

from typing import Any

import torch
from torch import randint, randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import Extent, size_of
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import OnnxForm, Sample, Symmetry, operator, sample
from regauge.ir.ops.broadcasting import expand_to
from regauge.ir.ops.layout import axis_number, holds_no_sizes
from regauge.ir.ops.lookup import as_int64, carried, carry
from regauge.ir.ops.onnx_indices import counted_from_the_start
from regauge.ir.sizes.expressions import same

# -- one place per entry -----------------------------------------------------------------------------------------------


def _scatter_rule(call: Call) -> Axes:
    """Axes on which all operands are equally long are carried; along ``dim`` every one keeps its indices."""
    axes, given = call.operand(0), [call.operand(i) for i in (1, 2) if call.operand(i)]
    dim = call.normal(call["dim"], len(axes)) if axes else 0
    for position, own in enumerate(axes):
        others = [axes_of[position] for axes_of in given]
        if position != dim:
            carry(call, own, *others)
            continue
        call.role("indexed", own)
        for other in others:
            call.role("whole", other)
        if len(others) == 2 and same(size_of(others[0]), size_of(others[1])):
            call.unify(*others)
    return list(axes)


def _scatter(build: Builder, x: Value, dim: int, index: Value, src: Any, *, reduce: str | None = None) -> Value:
    dim = axis_number(dim, x.rank)
    if reduce is None:
        return build.scatter(x, index, src, dim=dim)  # type: ignore[no-any-return]
    if not isinstance(src, Value):
        src = build.full(shape=index.shape, value=src, dtype=x.dtype)
    how = {"add": "sum", "multiply": "prod"}[reduce]
    return build.scatter_reduce(x, index, src, dim=dim, reduce=how)  # type: ignore[no-any-return]


def _scatter_add(build: Builder, x: Value, dim: int, index: Value, src: Value) -> Value:
    return build.scatter_add(x, index, src, dim=axis_number(dim, x.rank))  # type: ignore[no-any-return]


def _scatter_reduce(
    build: Builder, x: Value, dim: int, index: Value, src: Value, reduce: str, *, include_self: bool = True
) -> Value:
    options = {"dim": axis_number(dim, x.rank), "reduce": reduce, "include_self": include_self}
    return build.scatter_reduce(x, index, src, **options)  # type: ignore[no-any-return]


_ONNX_REDUCTIONS = {"mul": "prod", "max": "amax", "min": "amin"}


def _onnx_scatter_elements(build: Builder, call: Any) -> Value:
    x, updates = call.operand(0), call.operand(2)
    dim = axis_number(call.attribute("axis", 0), x.rank)
    index = as_int64(build, counted_from_the_start(build, call, 1, x, dim))
    reduction = call.attribute("reduction", "none")
    if reduction == "none":
        return build.scatter(x, index, updates, dim=dim)  # type: ignore[no-any-return]
    if reduction == "add":
        return build.scatter_add(x, index, updates, dim=dim)  # type: ignore[no-any-return]
    return build.scatter_reduce(x, index, updates, dim=dim, reduce=_ONNX_REDUCTIONS[reduction])  # type: ignore[no-any-return]


def _scatter_symmetry(node: Node) -> Symmetry:
    """A number other than zero does not scale with the index it is written to."""
    source = node.inputs[2]
    return Symmetry.INDEXWISE if isinstance(source, Value) or source == 0 else Symmetry.POINTWISE


def _places() -> torch.Tensor:
    return torch.tensor([[4, 1, 0], [2, 2, 3]])


@operator(
    rule=_scatter_rule,
    aten={"scatter": _scatter},
    onnx=dict.fromkeys(("ScatterElements", "Scatter"), OnnxForm(read=_onnx_scatter_elements, write=holds_no_sizes)),
    samples=lambda: [
        sample(randn(2, 5), torch.tensor([[4, 1, 0], [2, 0, 3]]), randn(2, 3), dim=1),
        sample(randn(5, 3), torch.tensor([[4, 1, 0], [2, 0, 3]]), randn(4, 3), dim=-2),
        sample(randn(2, 5), torch.tensor([[4, 1, 0], [2, 0, 3]]), 1.5, dim=1),
        sample(randn(3, 5), torch.tensor([[4, 1, 0], [2, 0, 3]]), randn(2, 4), dim=1),
    ],
    symmetry=_scatter_symmetry,
)
def scatter(x: torch.Tensor, index: torch.Tensor, src: torch.Tensor | float, *, dim: int) -> torch.Tensor:
    return torch.scatter(x, dim, index, src)


@operator(
    rule=_scatter_rule,
    aten={"scatter_add": _scatter_add},
    samples=lambda: [
        sample(randn(2, 5), _places(), randn(2, 3), dim=1),
        sample(randn(5, 3), _places(), randn(2, 3), dim=0),
    ],
    symmetry=Symmetry.INDEXWISE,
)
def scatter_add(x: torch.Tensor, index: torch.Tensor, src: torch.Tensor, *, dim: int) -> torch.Tensor:
    return torch.scatter_add(x, dim, index, src)


def _reductions() -> list[Sample]:
    return [
        sample(randn(2, 5), _places(), randn(2, 3), dim=1, reduce=how, include_self=own)
        for how, own in (("sum", True), ("prod", True), ("mean", True), ("amax", False), ("amin", True))
    ]


@operator(rule=_scatter_rule, aten={"scatter_reduce": _scatter_reduce}, samples=_reductions)
def scatter_reduce(
    x: torch.Tensor, index: torch.Tensor, src: torch.Tensor, *, dim: int, reduce: str, include_self: bool = True
) -> torch.Tensor:
    """``reduce`` is sum, prod, mean, amax or amin."""
    return torch.scatter_reduce(x, dim, index, src, reduce, include_self=include_self)


# -- whole slices at places of one axis --------------------------------------------------------------------------------


def _slices_rule(call: Call) -> Axes:
    """x and source differ on ``dim`` only; there the source is as long as the index."""
    axes, index, source = call.operand(0), call.operand(1), call.operand(2)
    dim = call.normal(call["dim"], len(axes)) if axes else 0
    written: Extent | None = index[0] if index else None
    for position, (own, other) in enumerate(zip(axes, source, strict=bool(source))):
        if position != dim:
            call.unify(own, other)
            carried(call, [own])
        elif written is not None:
            call.unify(written, other)
    if axes:
        call.role("indexed", axes[dim])
    if written is not None:
        call.role("whole", written)
    return list(axes)


def _index_copy(build: Builder, x: Value, dim: int, index: Value, source: Value) -> Value:
    index, source = _as_vector(build, x, index, source)
    return build.index_copy(x, index, source, dim=axis_number(dim, x.rank))  # type: ignore[no-any-return]


def _index_add(build: Builder, x: Value, dim: int, index: Value, source: Value, *, alpha: float = 1) -> Value:
    index, source = _as_vector(build, x, index, source)
    source = source if alpha == 1 else build.mul(source, alpha)
    return build.index_add(x, index, source, dim=axis_number(dim, x.rank))  # type: ignore[no-any-return]


def _as_vector(build: Builder, x: Value, index: Value, source: Value) -> tuple[Value, Value]:
    """torch takes an index without axes, which then writes one slice."""
    if index.rank:
        return index, source
    if source.rank != x.rank:
        raise OperatorError(f"a source of rank {source.rank} for a single entry of {x} has no rule")
    return build.reshape(index, shape=(1,)), source


def _index_fill(build: Builder, x: Value, dim: int, index: Value, value: Any) -> Value:
    if isinstance(value, Value):
        shape = (*x.shape[: axis_number(dim, x.rank)], index.shape[0], *x.shape[axis_number(dim, x.rank) + 1 :])
        return _index_copy(build, x, dim, index, expand_to(build, value, shape))
    return build.index_fill(x, index, dim=axis_number(dim, x.rank), value=value)  # type: ignore[no-any-return]


def _slices() -> list[Sample]:
    return [
        sample(randn(5, 3), torch.tensor([4, 0]), randn(2, 3), dim=0),
        sample(randn(2, 5, 3), torch.tensor([1, 4, 0]), randn(2, 3, 3), dim=-2),
    ]


@operator(rule=_slices_rule, aten={"index_copy": _index_copy}, samples=_slices, symmetry=Symmetry.LINEAR)
def index_copy(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor, *, dim: int) -> torch.Tensor:
    return torch.index_copy(x, dim, index, source)


@operator(rule=_slices_rule, aten={"index_add": _index_add}, samples=_slices, symmetry=Symmetry.LINEAR)
def index_add(x: torch.Tensor, index: torch.Tensor, source: torch.Tensor, *, dim: int) -> torch.Tensor:
    return torch.index_add(x, dim, index, source)


def _fill_rule(call: Call) -> Axes:
    axes = list(call.operand(0))
    call.role("indexed", axes[call.normal(call["dim"], len(axes))])
    for extent in call.operand(1):
        call.role("whole", extent)
    return axes


def _fill_symmetry(node: Node) -> Symmetry:
    return Symmetry.INDEXWISE if node.attributes["value"] == 0 else Symmetry.POINTWISE


@operator(
    rule=_fill_rule,
    aten={"index_fill": _index_fill},
    samples=lambda: [
        sample(randn(5, 3), torch.tensor([4, 0]), dim=0, value=0.0),
        sample(randn(2, 5), torch.tensor([1]), dim=-1, value=2.0),
    ],
    symmetry=_fill_symmetry,
)
def index_fill(x: torch.Tensor, index: torch.Tensor, *, dim: int, value: float) -> torch.Tensor:
    return torch.index_fill(x, dim, index, value)


# -- values in the order of a mask's hits ------------------------------------------------------------------------------


def _carried_axes(mask: Any, rank: int) -> int:
    """How many trailing axes the mask treats alike, because it was expanded over them: whole rows are written there."""
    node = getattr(mask, "producer", None)
    while node is not None and node.op in ("identity", "cast"):
        mask = node.inputs[0]
        node = mask.producer
    if node is None or node.op != "expand" or len(mask.shape) != rank:
        return 0
    before = node.inputs[0].shape
    count = 0
    while count < min(len(before), rank - 1) and same(before[-1 - count], 1):
        count += 1
    return count


def _masked_scatter_rule(call: Call) -> Axes:
    """Hits are counted in order, so axes keep their indices, except those of rows that are written whole."""
    x, mask, source = call.operand(0), call.operand(1), call.operand(2)
    axes = call.broadcast([x, mask])
    rows = _carried_axes(call.node.inputs[1], len(axes))
    rows = rows if len(source) > rows and len(x) == len(mask) == len(axes) else 0
    if any(
        not same(size_of(a), size_of(b))
        for a, b in zip(axes[len(axes) - rows :], source[len(source) - rows :], strict=True)
    ):
        rows = 0
    for a, b in zip(axes[len(axes) - rows :], source[len(source) - rows :], strict=True):
        call.unify(a, b)
        carried(call, [a])
    for extent in (*axes[: len(axes) - rows], *source[: len(source) - rows]):
        call.role("scan", extent)
    return axes


@operator(
    rule=_masked_scatter_rule,
    aten={"masked_scatter": None},
    samples=lambda: [
        sample(randn(2, 3), randint(0, 2, (2, 3)).bool(), randn(6)),
        sample(randn(2, 3), randint(0, 2, (2, 1)).bool(), randn(2, 3)),
    ],
    symmetry=Symmetry.LINEAR,
)
def masked_scatter(x: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return torch.masked_scatter(x, mask, source)
