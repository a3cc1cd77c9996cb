"""Lookup: tables read by position. The axis that is read by position keeps its indices, every other one is carried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import randint, randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import Extent, size_of
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.operator import OnnxForm, Symmetry, operator, sample
from regauge.ir.ops.broadcasting import broadcast_shape, expand_to
from regauge.ir.ops.layout import axis_number, holds_no_sizes
from regauge.ir.ops.onnx_indices import counted_from_the_start, counts_from_start, is_torch_embedding
from regauge.ir.ops.shuffling import groups_of, shuffled_places
from regauge.ir.scalars import Scalar
from regauge.ir.sizes.expressions import Size, product, same

# -- embedding ---------------------------------------------------------------------------------------------------------


def _embedding(
    build: Builder, weight: Value, indices: Value, padding_idx: int = -1, scale_grad: bool = False, sparse: bool = False
) -> Value:
    # torch writes "no padding" as -1; scaled and sparse gradients are matters of training, not of the function
    padding = None if padding_idx < 0 else padding_idx
    return build.embedding(weight, indices, padding_idx=padding)  # type: ignore[no-any-return]


def _embedding_layer(node: Node) -> str | None:
    if node.attributes["from_end"]:
        return None
    entries, width = node.inputs[0].shape  # type: ignore[union-attr]
    padding = node.attributes["padding_idx"]
    return f"nn.Embedding({entries}, {width}{'' if padding is None else f', padding_idx={padding}'})"


def carried(call: Call, axes: Sequence[Extent]) -> Axes:
    """Axes that are read as they are, whole vectors at once: any linear map of them commutes with the lookup."""
    for extent in axes:
        call.role("produce", extent)
    call.linear(*axes)
    return list(axes)


def _embedding_rule(call: Call) -> Axes:
    entries, width = call.operand(0)
    call.role("indexed", entries)
    return [*call.operand(1), *carried(call, [width])]


def _embedding_shape(weight: Value, indices: Value, *, padding_idx: int | None, **_: Any) -> tuple[Size, ...] | None:
    return (*indices.shape, weight.shape[1]) if weight.rank == 2 and padding_idx is None else None


def _embedding_element(weight: Scalar, indices: Scalar, *, padding_idx: int | None, from_end: bool) -> Scalar | None:
    return None if from_end else scalars.picked(weight, 0, indices, padding_idx)


@operator(
    rule=_embedding_rule,
    shape=_embedding_shape,
    aten={"embedding": _embedding},
    element=_embedding_element,
    spell=lambda onnx, node: onnx.Gather(*onnx.operands(2), axis=0),
    samples=lambda: [
        sample(randn(7, 4), randint(0, 7, (2, 3))),
        sample(randn(5, 3), randint(0, 5, (4,)), padding_idx=0),
        sample(randn(5, 3), torch.tensor(2)),
        sample(randn(5, 3), torch.tensor([4, -1, -5, 0]), from_end=True),
    ],
    symmetry=Symmetry.LINEAR,
    layer=_embedding_layer,
)
def embedding(
    weight: torch.Tensor, indices: torch.Tensor, *, padding_idx: int | None = None, from_end: bool = False
) -> torch.Tensor:
    """With ``from_end`` negative indices count from the end, as in ONNX; else there are none."""
    if from_end:
        return F.embedding(torch.where(indices < 0, indices + weight.shape[0], indices), weight, padding_idx)
    return F.embedding(indices, weight, padding_idx)


_BAG_MODES = ("sum", "mean", "max")


def _bag_rule(call: Call) -> Axes:
    (entries, width), indices, offsets = call.operand(0), call.operand(1), call.operand(2)
    call.role("indexed", entries)
    if call.has(3):
        call.unify(indices[0], call.operand(3)[0])
    call.role("scan", indices[0])
    call.role("scan", offsets[0])
    bags = call.fresh(call.node.outputs[0].shape[0]) if call["include_last_offset"] else offsets[0]
    call.pin(bags, "each entry is a bag of indices")
    return [bags, width]


def _embedding_bag(
    build: Builder, weight: Value, indices: Value, offsets: Value, scale_grad: bool = False, mode: int = 0,
    sparse: bool = False, per_sample_weights: Value | None = None, include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:  # fmt: skip
    padding = None if padding_idx is None or padding_idx < 0 else padding_idx
    options = {"mode": _BAG_MODES[mode], "include_last_offset": include_last_offset, "padding_idx": padding}
    return build.embedding_bag(weight, indices, offsets, per_sample_weights, **options)


@operator(
    rule=_bag_rule,
    aten=dict.fromkeys(("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only"), _embedding_bag),
    samples=lambda: [
        sample(randn(7, 4), randint(0, 7, (6,)), torch.tensor([0, 2, 5]), mode="mean"),
        sample(randn(7, 4), randint(0, 7, (6,)), torch.tensor([0, 2, 2, 6]), mode="max", include_last_offset=True),
        sample(randn(7, 4), randint(0, 7, (6,)), torch.tensor([0, 3]), randn(6), mode="sum", padding_idx=1),
    ],
    macs=lambda call: call.size(1, 0) * call.size(0, 1),
    zeroed_by=("weight",),
)
def embedding_bag(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    per_sample_weights: torch.Tensor | None = None,
    *,
    mode: str,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> torch.Tensor:
    return F.embedding_bag(
        indices, weight, offsets, mode=mode, per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset, padding_idx=padding_idx,
    )  # fmt: skip


# -- entries along one axis --------------------------------------------------------------------------------------------


def _index_select_rule(call: Call) -> Axes:
    axes, indices = call.operand(0), call.operand(1)
    dim = call.normal(call["dim"], len(axes))
    call.role("indexed", axes[dim])
    return [*carried(call, axes[:dim]), *indices, *carried(call, axes[dim + 1 :])]


def _index_select(build: Builder, x: Value, dim: int, index: Value) -> Value:
    if index.rank == 0:
        index = build.reshape(index, shape=(1,))
    return build.index_select(x, index, dim=axis_number(dim, x.rank))  # type: ignore[no-any-return]


def _take(build: Builder, x: Value, index: Value) -> Value:
    return build.index_select(build.reshape(x, shape=(product(x.shape),)), index, dim=0)  # type: ignore[no-any-return]


def _onnx_gather(build: Builder, call: Any) -> Value:
    """Gather: a table of embeddings, or of an axis one entry, a run, copies of all, all shuffled, or any entries."""
    x = call.operand(0)
    axis = axis_number(call.attribute("axis", 0), x.rank)
    known, size = call.constant(1), x.shape[axis]
    if known is not None and isinstance(size, int):
        known = known + size * (known < 0)
    if known is not None and known.dim() == 0 and (known >= 0 or isinstance(size, int)):
        return build.select(x, dim=axis, index=int(known))  # type: ignore[no-any-return]
    is_table = isinstance(x, Parameter) and x.kind == "parameter" and x.rank == 2 and axis == 0
    # a table stays one where the positions are known, so that all exports of it have the same groups
    if is_table and (call.constant(1) is None or counts_from_start(call, 1)):
        from_end = not counts_from_start(call, 1) and not is_torch_embedding(build, call, x)
        return build.embedding(x, call.operand(1), from_end=from_end)  # type: ignore[no-any-return]
    if known is not None and known.dim() == 1 and _is_run(known):
        start = int(known[0])
        return build.slice(x, dim=axis, start=start, end=start + len(known))  # type: ignore[no-any-return]
    copies = _copies(known, size) if known is not None and isinstance(size, int) else 1
    if copies > 1:
        return build.repeat_interleave(x, repeats=copies, dim=axis)  # type: ignore[no-any-return]
    groups = groups_of(known, size) if known is not None and isinstance(size, int) else 1
    if groups > 1:
        return build.shuffle(x, groups=groups, dim=axis)  # type: ignore[no-any-return]
    return build.index_select(x, call.operand(1), dim=axis)  # type: ignore[no-any-return]


def _copies(table: torch.Tensor, size: int) -> int:
    """How often a table reads each of so many entries before it goes on to the next; 1 where it is no such table."""
    copies = table.numel() // max(size, 1)
    each = torch.arange(size, dtype=table.dtype).repeat_interleave(copies)
    return copies if table.dim() == 1 and torch.equal(each, table) else 1


def _is_run(table: torch.Tensor) -> bool:
    """Whether a table reads neighbouring entries in order."""
    return len(table) > 0 and int(table[0]) >= 0 and bool((table.diff() == 1).all())


def _write_gather(nodes: Sequence[Node], patch: Any) -> None:
    """A run of entries moves when what lies before it is cut; what is left is copied or shuffled."""
    node = nodes[0]
    if node.op == "slice":
        patch.set_sizes(1, list(range(node.attributes["start"], node.attributes["end"])))
    if node.op == "shuffle":
        size = int(node.outputs[0].shape[node.attributes["dim"]])
        patch.set_sizes(1, shuffled_places(size, node.attributes["groups"]).tolist())
    if node.op == "repeat_interleave":
        entries = range(node.inputs[0].shape[node.attributes["dim"]])  # type: ignore[union-attr]
        patch.set_sizes(1, [entry for entry in entries for _ in range(node.attributes["repeats"])])


def _onnx_compress(build: Builder, call: Any) -> Value:
    """Compress by a mask that is known."""
    mask = call.constant(1)
    if mask is None:
        raise OperatorError("the mask of Compress is computed from data, which decides the size of the result")
    x, axis = call.operand(0), call.attribute("axis")
    if axis is None:
        x, axis = build.reshape(x, shape=(product(x.shape),)), 0
    return build.index_select(x, build.constant(mask.nonzero()[:, 0], "kept"), dim=axis_number(axis, x.rank))  # type: ignore[no-any-return]


def _index_select_shape(x: Value, indices: Value, *, dim: int) -> tuple[Size, ...] | None:
    dim = axis_number(dim, x.rank)
    return (*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]) if x.rank else None


@operator(
    rule=_index_select_rule,
    shape=_index_select_shape,
    aten={"index_select": _index_select, "take": _take},
    onnx={"Gather": OnnxForm(read=_onnx_gather, write=_write_gather, stores_shape=True),
          "Compress": OnnxForm(read=_onnx_compress, write=holds_no_sizes)},
    spell=lambda onnx, node: onnx.Gather(
        *onnx.operands(2), axis=axis_number(node.attributes["dim"], node.inputs[0].rank)
    ),
    samples=lambda: [
        sample(randn(5, 3), randint(-5, 5, (2, 4)), dim=0),
        sample(randn(2, 5, 3), randint(0, 5, (4,)), dim=1),
        sample(randn(2, 5), torch.tensor(3), dim=-1),
        sample(randn(5), torch.tensor(-1), dim=0),
    ],
    symmetry=Symmetry.LINEAR,
)  # fmt: skip
def index_select(x: torch.Tensor, indices: torch.Tensor, *, dim: int) -> torch.Tensor:
    """``indices`` may have any rank: its axes stand where ``dim`` stood; negative ones count from the end."""
    if dim == 0 and indices.dim() > 0:
        return x[indices]
    return torch.ops.aten.index.Tensor(x, [None] * (dim % x.dim()) + [indices])  # type: ignore[no-any-return]


# -- one entry per place -----------------------------------------------------------------------------------------------


def _gather_rule(call: Call) -> Axes:
    """An axis on which both tensors are equally long is carried; along ``dim`` the result is as long as the index."""
    axes, index = call.operand(0), call.operand(1)
    dim = call.normal(call["dim"], len(axes)) if axes else 0
    for position, (own, other) in enumerate(zip(axes, index, strict=True)):
        if position == dim:
            call.role("indexed", own)
        else:
            carry(call, own, other)
    return list(index)


def carry(call: Call, *extents: Extent) -> None:
    """Axes read place by place: the same indices where all are equally long, else positions that may not move."""
    if all(same(size_of(extent), size_of(extents[0])) for extent in extents):
        for extent in extents[1:]:
            call.unify(extents[0], extent)
        return
    for extent in extents:
        call.role("indexed", extent)


def _gather(build: Builder, x: Value, dim: int, index: Value, *, sparse_grad: bool = False) -> Value:
    return build.gather(x, index, dim=axis_number(dim, x.rank))  # type: ignore[no-any-return]


def _take_along_dim(build: Builder, x: Value, indices: Value, dim: int | None = None) -> Value:
    if dim is None:
        x = build.reshape(x, shape=(product(x.shape),))
        return build.gather(x, build.reshape(indices, shape=(product(indices.shape),)), dim=0)  # type: ignore[no-any-return]
    dim = axis_number(dim, x.rank)
    others = broadcast_shape(
        (*x.shape[:dim], 1, *x.shape[dim + 1 :]), (*indices.shape[:dim], 1, *indices.shape[dim + 1 :])
    )
    x = expand_to(build, x, (*others[:dim], x.shape[dim], *others[dim + 1 :]))
    indices = expand_to(build, indices, (*others[:dim], indices.shape[dim], *others[dim + 1 :]))
    return build.gather(x, indices, dim=dim)  # type: ignore[no-any-return]


def as_int64(build: Builder, index: Value) -> Value:
    """``torch.gather``, ``scatter`` and ``one_hot`` take 64-bit indices only."""
    return index if index.dtype == torch.int64 else build.cast(index, dtype=torch.int64)


def _onnx_gather_elements(build: Builder, call: Any) -> Value:
    x = call.operand(0)
    axis = axis_number(call.attribute("axis", 0), x.rank)
    index = counted_from_the_start(build, call, 1, x, axis)
    return build.gather(x, as_int64(build, index), dim=axis)  # type: ignore[no-any-return]


def _spell_gather(onnx: Any, node: Node) -> Any:
    """GatherElements wants axes of the same sizes but for the one it gathers along, torch at most the sizes of x."""
    x, index = node.inputs[0], node.inputs[1]
    assert isinstance(x, Value) and isinstance(index, Value)
    axis = axis_number(node.attributes["dim"], x.rank)
    operand = onnx.operand(0)
    for other in range(x.rank):
        if other != axis and not same(x.shape[other], index.shape[other]):
            bounds = ([0], [index.shape[other]], [other])
            operand = onnx.Slice(operand, *(onnx.sizes(numbers) for numbers in bounds))
    return onnx.GatherElements(operand, onnx.operand(1), axis=axis)


def _gather_shape(x: Value, index: Value, *, dim: int) -> tuple[Size, ...] | None:
    dim = axis_number(dim, x.rank)
    pairs = [pair for place, pair in enumerate(zip(x.shape, index.shape, strict=True)) if place != dim]
    fits = all(same(a, b) or (isinstance(a, int) and isinstance(b, int) and b <= a) for a, b in pairs)
    return index.shape if x.rank and fits else None


@operator(
    rule=_gather_rule,
    shape=_gather_shape,
    aten={"gather": _gather, "take_along_dim": _take_along_dim},
    onnx={"GatherElements": OnnxForm(read=_onnx_gather_elements, write=holds_no_sizes)},
    spell=_spell_gather,
    samples=lambda: [
        sample(randn(2, 5, 3), randint(0, 5, (2, 4, 3)), dim=1),
        sample(randn(4, 5), randint(0, 5, (2, 5)), dim=-1),
        sample(randn(4), randint(0, 4, (6,)), dim=0),
    ],
    symmetry=Symmetry.INDEXWISE,
    zeroed_by=("x",),
)
def gather(x: torch.Tensor, index: torch.Tensor, *, dim: int) -> torch.Tensor:
    return torch.gather(x, dim, index)


# -- the reverse: a mark at each position ------------------------------------------------------------------------------


def _one_hot_rule(call: Call) -> Axes:
    classes = call.fresh(call["num_classes"])
    call.role("indexed", classes)
    return [*call.operand(0), classes]


def _one_hot(build: Builder, x: Value, num_classes: Any = -1) -> Value:
    if isinstance(num_classes, int) and num_classes < 0:
        raise OperatorError("one_hot counts the classes in its data: give num_classes")
    return build.one_hot(x, num_classes=num_classes)  # type: ignore[no-any-return]


def _onnx_one_hot(build: Builder, call: Any) -> Value:
    """OneHot(indices, depth, [off, on]): indices outside of [-depth, depth) mark nothing."""
    index, depth, values = call.operand(0), call.number(1), call.operand(2)
    if depth is None:
        raise OperatorError("the depth of OneHot is computed from data, which decides the size of the result")
    depth = int(depth)
    axis = call.attribute("axis", -1) % (index.rank + 1)
    index = as_int64(build, index)
    index = build.where(build.lt(index, 0), build.add(index, depth), index)
    classes = build.constant(torch.arange(depth).reshape([-1] + [1] * (index.rank - axis)), "classes")
    off, on = build.select(values, dim=0, index=0), build.select(values, dim=0, index=1)
    return build.where(build.eq(build.unsqueeze(index, dim=axis), classes), on, off)  # type: ignore[no-any-return]


@operator(
    rule=_one_hot_rule,
    aten={"one_hot": _one_hot},
    onnx={"OneHot": OnnxForm(read=_onnx_one_hot, write=holds_no_sizes)},
    samples=lambda: [sample(randint(0, 5, (2, 3)), num_classes=5), sample(torch.tensor(1), num_classes=3)],
)
def one_hot(x: torch.Tensor, *, num_classes: int) -> torch.Tensor:
    return F.one_hot(x, num_classes)
