"""Slicing: cutting tensors apart along an axis, and putting pieces back in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import Concat, Extent, size_of
from regauge.ir.dims.unify import split_minor
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import OnnxForm, Symmetry, operator, sample
from regauge.ir.ops.layout import axis_number
from regauge.ir.ops.slice_bounds import ANYWHERE, bound, slice_places, spelled
from regauge.ir.scalars import Scalar
from regauge.ir.sizes.expressions import Size, at_least, divide, floor_divide, is_static, same, simplify

# -- slice -------------------------------------------------------------------------------------------------------------


def slice_axis(
    build: Builder, x: Value, dim: int, start: Size | None = None, end: Size | None = None, step: int = 1
) -> Any:
    """``x[start:end:step]`` on one axis, as Python reads it, with all bounds normalised; the whole axis is ``x``.

    What torch traced holds only where its bounds compare with dynamic sizes as they did; all else is clamped.
    """
    dim = axis_number(dim, x.rank)
    size = x.shape[dim]
    start, end = 0 if start is None else start, size if end is None else end
    if build.expected:
        first, last = bound(start, size), bound(end, size)
        if isinstance(first, int) and isinstance(last, int):
            last = max(first, last)
    else:
        first, last = slice_places(start, end, size)
    if step == 1 and same(first, 0) and same(last, size):
        return x
    return build.slice(x, dim=dim, start=first, end=last, step=step)


def _between(call: Call, axis: Extent) -> Extent:
    """The part of an axis from ``start`` to ``end``; both are derived from what lies before them."""
    start, end = call["start"], call["end"]
    before, kept, _ = call.split(axis, (start, simplify(end - start), simplify(size_of(axis) - end)))
    call.derive(start=before, end=Concat((before, kept)))
    return kept


def _every(call: Call, axis: Extent, count: Size) -> Extent:
    """Every step-th entry: where steps tile the axis its major part stays free, and only the phase is pinned."""
    start, step = call["start"], call["step"]
    tiled = divide(size_of(axis), step)
    covers = tiled is not None and same(tiled, count) and isinstance(start, int) and start < step
    parts = split_minor(axis, step) if covers else None
    if parts is not None:
        call.role("whole", parts[1])
        call.derive(end=axis)
        return parts[0]
    taken = call.fresh(count)
    call.role("whole", axis)
    call.role("whole", taken)
    return taken


def _slice_rule(call: Call) -> Axes:
    axes = list(call.operand(0))
    dim = call.normal(call["dim"], len(axes))
    count = call.node.outputs[0].shape[dim]
    axes[dim] = _between(call, axes[dim]) if call["step"] == 1 else _every(call, axes[dim], count)
    return axes


def _slice_shape(x: Value, *, dim: int, start: Size, end: Size, step: int = 1) -> list[Size] | None:
    """The size follows from the places alone: torch, asked with numbers for the sizes, would take sides."""
    if not (at_least(start, 0) and at_least(end, 0)):
        return None
    axis = axis_number(dim, x.rank)
    size, length = x.shape[axis], simplify(end - start)
    if isinstance(start, int) and isinstance(end, int):
        length = max(0, (min(end, size) if isinstance(size, int) else end) - start)
    count = length if step == 1 else floor_divide(simplify(length + step - 1), step)
    return [*x.shape[:axis], count, *x.shape[axis + 1 :]]


def _narrow(build: Builder, x: Value, dim: int, start: Size, length: Size) -> Any:
    if isinstance(start, Value):
        raise OperatorError("narrow from a computed place: that place depends on data")
    first = bound(start, x.shape[axis_number(dim, x.rank)])
    return slice_axis(build, x, dim, first, simplify(first + length))


def _diff(build: Builder, x: Value, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    dim = axis_number(dim, x.rank)
    pieces = [piece for piece in (prepend, x, append) if piece is not None]
    x = build.concat(*pieces, dim=dim) if len(pieces) > 1 else x
    for _ in range(n):
        later, earlier = slice_axis(build, x, dim, 1), slice_axis(build, x, dim, 0, -1)
        x = build.logical_xor(later, earlier) if x.dtype == torch.bool else build.sub(later, earlier)
    return x


def _onnx_slice(build: Builder, call: Any) -> Any:
    x = call.operand(0)
    if call.opset < 10:
        starts, ends, axes, steps = call.attribute("starts"), call.attribute("ends"), call.attribute("axes"), None
    else:
        starts, ends, axes, steps = [call.sizes(i) if call.has(i) else None for i in range(1, 5)]
    computed = any(call.has(i) and call.sizes(i) is None for i in range(1, call.count))
    if starts is None or ends is None or computed:
        raise OperatorError("the bounds of Slice are computed from data")
    axes = range(len(starts)) if axes is None else [int(a) for a in axes]
    steps = [1] * len(starts) if steps is None else [int(s) for s in steps]
    for dim, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step > 0:
            x = slice_axis(build, x, dim, start, end, step)
        elif step == -1 and _is_full_reversal(x.shape[dim], start, end):
            x = build.flip(x, dims=(axis_number(dim, x.rank),))
        else:
            raise OperatorError(f"a slice with the step {step} reads backwards: that has no rule")
    return x


def _is_full_reversal(size: Size, start: Size, end: Size) -> bool:
    from_the_end = same(start, -1) or (isinstance(start, int) and isinstance(size, int) and start >= size - 1)
    return from_the_end and isinstance(end, int) and end <= -(size + 1 if isinstance(size, int) else ANYWHERE)


def _write_slice(nodes: Sequence[Node], patch: Any) -> None:
    """All axes are written anew: axes that were taken whole have no node, and need no bound."""
    slices = [node for node in nodes if node.op == "slice"]
    bounds = [_spelled_bounds(node) for node in slices]
    starts, ends = [start for start, _ in bounds], [end for _, end in bounds]
    axes = [node.attributes["dim"] for node in slices]
    if "starts" in nodes[0].origin.attributes:
        for name, numbers in (("starts", starts), ("ends", ends), ("axes", axes)):
            patch.attribute(name, numbers)
        return
    for slot, numbers in enumerate((starts, ends, axes, [node.attributes["step"] for node in slices]), 1):
        patch.set_sizes(slot, numbers)


def _spelled_bounds(node: Node) -> tuple[Size, Size]:
    x = node.inputs[0]
    assert isinstance(x, Value)
    return spelled(node.attributes["start"], node.attributes["end"], x.shape[node.attributes["dim"]])


def _spell_slice(onnx: Any, node: Node) -> Any:
    """Bounds are attributes before opset 10, without a step."""
    dim, step = node.attributes["dim"], node.attributes["step"]
    start, end = _spelled_bounds(node)
    if onnx.opset < 10:
        if step != 1:
            raise onnx.refusal("Slice has no steps before opset 10")
        return onnx.Slice(onnx.operand(0), starts=[start], ends=[end], axes=[dim])
    return onnx.Slice(onnx.operand(0), *(onnx.sizes([number]) for number in (start, end, dim, step)))


def _spell_select(onnx: Any, node: Node) -> Any:
    index = node.attributes["index"]
    if not isinstance(index, int):
        raise onnx.refusal(f"the place {index} depends on a dynamic size")
    return onnx.Gather(onnx.operand(0), onnx.constant(index), axis=axis_number(node.attributes["dim"], _rank(node)))


def _rank(node: Node) -> int:
    x = node.inputs[0]
    assert isinstance(x, Value)
    return x.rank


def _slice_element(x: Scalar, *, dim: int, start: Size, end: Size, step: int) -> Scalar | None:
    return scalars.moved(x, {dim: scalars.along(dim, step, start)}) if is_static(start) else None


@operator(
    name="slice",
    rule=_slice_rule,
    shape=_slice_shape,
    aten={"slice": slice_axis, "narrow": _narrow, "diff": _diff},
    onnx={"Slice": OnnxForm(read=_onnx_slice, write=_write_slice)},
    spell=_spell_slice,
    samples=lambda: [
        sample(randn(2, 7), dim=1, start=2, end=5),
        sample(randn(6, 3), dim=-2, start=0, end=4),
        sample(randn(6, 3), dim=0, start=3, end=6),
        sample(randn(2, 8), dim=1, start=1, end=8, step=2),
        sample(randn(2, 9), dim=1, start=0, end=9, step=3),
        sample(randn(2, 7), dim=1, start=0, end=7, step=2),
        sample(randn(5), dim=0, start=2, end=2),
    ],
    symmetry=Symmetry.LAYOUT,
    element=_slice_element,
)
def _slice(x: torch.Tensor, *, dim: int, start: int, end: int, step: int = 1) -> torch.Tensor:
    return x[(slice(None),) * (dim % x.dim()) + (slice(start, end, step),)]


# -- single entries ----------------------------------------------------------------------------------------------------


def _select_rule(call: Call) -> Axes:
    axes = list(call.operand(0))
    call.role("indexed", axes.pop(call.normal(call["dim"], len(axes))))
    return axes


def _entry(x: Value, dim: int, index: Size) -> Size:
    if isinstance(index, Value):
        raise OperatorError("select of a computed entry depends on data")
    negative = index < 0 if isinstance(index, int) else bool(index.is_negative)
    return simplify(index + x.shape[dim]) if negative else index


def _select(build: Builder, x: Value, dim: int, index: Size) -> Any:
    dim = axis_number(dim, x.rank)
    return build.select(x, dim=dim, index=_entry(x, dim, index))


def _select_element(x: Scalar, *, dim: int, index: Size) -> Scalar | None:
    return scalars.moved(x, {dim: scalars.Place(offset=index)}) if is_static(index) else None


@operator(
    rule=_select_rule,
    aten={"select": _select},
    spell=_spell_select,
    samples=lambda: [
        sample(randn(2, 3, 4), dim=1, index=2),
        sample(randn(2, 3), dim=-1, index=0),
        sample(randn(3), dim=0, index=1),
    ],
    symmetry=Symmetry.LAYOUT,
    element=_select_element,
)
def select(x: torch.Tensor, *, dim: int, index: int) -> torch.Tensor:
    return x.select(dim, index)


# -- putting pieces back -----------------------------------------------------------------------------------------------


def _unify_others(call: Call, dim: int, source: Axes) -> None:
    axes = call.operand(0)
    others = [extent for i, extent in enumerate(axes) if i != dim]
    for a, b in zip(others, source, strict=True):
        call.unify(a, b)


def _slice_scatter_rule(call: Call) -> Axes:
    """x's axis is what lies before the slice, the slice (the source's axis), and what lies after it."""
    axes, source = call.operand(0), list(call.operand(1))
    dim = call.normal(call["dim"], len(axes))
    piece = source.pop(dim)
    _unify_others(call, dim, source)
    kept = _between(call, axes[dim]) if call["step"] == 1 else _every(call, axes[dim], size_of(piece))
    call.unify(kept, piece)
    return list(axes)


def _slice_scatter(
    build: Builder,
    x: Value,
    src: Value,
    dim: int = 0,
    start: Size | None = None,
    end: Size | None = None,
    step: int = 1,
) -> Any:
    dim = axis_number(dim, x.rank)
    size = x.shape[dim]
    first = bound(0 if start is None else start, size)
    last = bound(size if end is None else end, size)
    if step == 1 and same(first, 0) and same(last, size) and src.dtype == x.dtype:
        return src
    return build.slice_scatter(x, src, dim=dim, start=first, end=last, step=step)


@operator(
    rule=_slice_scatter_rule,
    aten={"slice_scatter": _slice_scatter},
    samples=lambda: [
        sample(randn(2, 7), randn(2, 3), dim=1, start=2, end=5),
        sample(randn(6, 3), randn(4, 3), dim=-2, start=0, end=4),
        sample(randn(2, 8), randn(2, 4), dim=1, start=1, end=8, step=2),
    ],
    symmetry=Symmetry.LAYOUT,
)
def slice_scatter(x: torch.Tensor, src: torch.Tensor, *, dim: int, start: int, end: int, step: int = 1) -> torch.Tensor:
    return torch.slice_scatter(x, src, dim, start, end, step)


def _select_scatter_rule(call: Call) -> Axes:
    axes = list(call.operand(0))
    dim = call.normal(call["dim"], len(axes))
    call.role("indexed", axes[dim])
    _unify_others(call, dim, call.operand(1))
    return axes


def _select_scatter(build: Builder, x: Value, src: Value, dim: int, index: Size) -> Any:
    dim = axis_number(dim, x.rank)
    return build.select_scatter(x, src, dim=dim, index=_entry(x, dim, index))


@operator(
    rule=_select_scatter_rule,
    aten={"select_scatter": _select_scatter},
    samples=lambda: [
        sample(randn(2, 3, 4), randn(2, 4), dim=1, index=2),
        sample(randn(3, 2), randn(3), dim=-1, index=0),
    ],
    symmetry=Symmetry.LAYOUT,
)
def select_scatter(x: torch.Tensor, src: torch.Tensor, *, dim: int, index: int) -> torch.Tensor:
    return torch.select_scatter(x, src, dim, index)


# -- sliding windows ---------------------------------------------------------------------------------------------------


def _unfold_rule(call: Call) -> Axes:
    """Windows that tile the axis are a reshape ``(w s) -> w s``; overlapping ones pin it."""
    axes = list(call.operand(0))
    dim = call.normal(call["dim"], len(axes))
    size, step = call["size"], call["step"]
    parts = split_minor(axes[dim], size) if same(size, step) else None
    if parts is not None:
        call.derive(size=parts[1], step=parts[1])
        return [*axes[:dim], parts[0], *axes[dim + 1 :], parts[1]]
    windows, inside = call.fresh(call.node.outputs[0].shape[dim]), call.fresh(size)
    for extent in (axes[dim], windows, inside):
        call.role("window", extent)
    return [*axes[:dim], windows, *axes[dim + 1 :], inside]


@operator(
    rule=_unfold_rule,
    aten={
        "unfold": lambda build, x, dim, size, step: build.unfold(x, dim=axis_number(dim, x.rank), size=size, step=step)
    },
    samples=lambda: [
        sample(randn(2, 7), dim=1, size=3, step=2),
        sample(randn(6, 3), dim=0, size=2, step=2),
        sample(randn(2, 8, 3), dim=-2, size=4, step=1),
    ],
    symmetry=Symmetry.LAYOUT,
)
def unfold(x: torch.Tensor, *, dim: int, size: int, step: int) -> torch.Tensor:
    return x.unfold(dim, size, step)
