"""Advanced indexing: several index tensors at once, for reading and for writing, with numpy's layout of the result.

    x[:, i, j]      n h w e, i..., j...   -> n (broadcast of i and j)... e      side by side: in place of the first
    x[i, :, j]      n h w e, i..., j...   -> (broadcast of i and j)... h e      apart: in front

Axes that are looked up keep their indices; the others are carried, and stay free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import randint, randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import size_of
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import OnnxForm, Symmetry, operator, sample
from regauge.ir.ops.layout import holds_no_sizes
from regauge.ir.ops.lookup import carried
from regauge.ir.sizes.expressions import Size, same

Indices = Sequence[Value | None]


def _layout(call: Call, indices: Sequence[Axes | None]) -> tuple[Axes, Axes]:
    """The axes of ``x[indices]``, and those among them that the index tensors bring; looked-up axes get their role."""
    axes = call.operand(0)
    places = [place for place, index in enumerate(indices) if index is not None]
    for place in places:
        call.role("indexed", axes[place])
    found = call.broadcast([index for index in indices if index is not None])
    rest = [extent for place, extent in enumerate(axes) if place not in places]
    neighbours = places == list(range(places[0], places[-1] + 1))
    at = places[0] if neighbours else 0
    return [*rest[:at], *found, *rest[at:]], found


# -- reading -----------------------------------------------------------------------------------------------------------


def _index_rule(call: Call) -> Axes:
    result, found = _layout(call, call.axes[1:])
    carried(call, [extent for extent in result if not any(extent is other for other in found)])
    return result


def positions_only(indices: Indices) -> list[Value | None]:
    """Indices without trailing absent ones; raises OperatorError for a mask, whose hits decide the result's size."""
    result = list(indices)
    while result and result[-1] is None:
        result.pop()
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in result):
        raise OperatorError("indexing with a mask has a size that depends on data")
    return result


def _hits(build: Builder, indices: Indices) -> Indices:
    """One mask among the indices as the places where it holds: ``x[mask]`` is ``x[mask.nonzero()[:, 0]]``.

    How many there are the framework has to know.
    """
    places = [place for place, index in enumerate(indices) if index is not None]
    mask = indices[places[0]] if len(places) == 1 else None
    if mask is None or mask.dtype != torch.bool or not build.expected or build.expected[0] is None:
        return indices
    shape, _ = build.expected[0]
    hits = build.nonzero(mask, results=[((shape[places[0]], mask.rank), torch.int64)])
    return [None] * places[0] + [build.select(hits, dim=1, index=axis) for axis in range(mask.rank)]


def _index(build: Builder, x: Value, indices: Indices) -> Value:
    indices = positions_only(_hits(build, indices))
    places = [place for place, index in enumerate(indices) if index is not None]
    if not places:
        return x
    if len(places) == 1:
        return build.index_select(x, indices[places[0]], dim=places[0])  # type: ignore[no-any-return]
    return build.index(x, *indices)  # type: ignore[no-any-return]


@operator(
    rule=_index_rule,
    aten={"index": _index, "_unsafe_index": _index},
    samples=lambda: [
        sample(randn(5, 3), randint(0, 5, (2, 4))),
        sample(randn(2, 5, 6, 3), None, randint(0, 5, (4, 1)), randint(-6, 6, (7,))),
        sample(randn(5, 3, 6, 2), randint(0, 5, (4,)), None, randint(0, 6, (2, 1))),
        sample(randn(5, 3), randint(0, 5, (4,)), torch.tensor(1)),
    ],
    symmetry=Symmetry.LINEAR,
)
def index(x: torch.Tensor, *indices: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.aten.index.Tensor(x, list(indices))  # type: ignore[no-any-return]


def _gather_nd_rule(call: Call) -> Axes:
    axes, indices = call.operand(0), list(call.operand(1))
    shared, depth = call["batch_dims"], size_of(indices[-1])
    assert isinstance(depth, int)
    call.role("whole", indices.pop())
    for a, b in zip(axes[:shared], indices, strict=False):
        call.unify(a, b)
    for extent in axes[shared : shared + depth]:
        call.role("indexed", extent)
    return [*indices, *carried(call, axes[shared + depth :])]


def _onnx_gather_nd(build: Builder, call: Any) -> Value:
    x, indices = call.operand(0), call.operand(1)
    if not isinstance(indices.shape[-1], int):
        raise OperatorError("how many axes GatherND looks up depends on data")
    return build.gather_nd(x, indices, batch_dims=call.attribute("batch_dims", 0))  # type: ignore[no-any-return]


def _gather_nd_shape(x: Value, indices: Value, *, batch_dims: int) -> tuple[Size, ...] | None:
    depth = indices.shape[-1]
    if not isinstance(depth, int) or batch_dims + depth > x.rank or x.shape[:batch_dims] != indices.shape[:batch_dims]:
        return None
    return (*indices.shape[:-1], *x.shape[batch_dims + depth :])


@operator(
    rule=_gather_nd_rule,
    shape=_gather_nd_shape,
    onnx={"GatherND": OnnxForm(read=_onnx_gather_nd, write=holds_no_sizes)},
    spell=lambda onnx, node: onnx.GatherND(*onnx.operands(2), batch_dims=node.attributes["batch_dims"] or None),
    samples=lambda: [
        sample(randn(5, 6, 3), randint(-5, 5, (4, 2))),
        sample(randn(5, 3), randint(0, 5, (2, 4, 1))),
        sample(randn(2, 5, 6, 3), randint(0, 5, (2, 4, 2)), batch_dims=1),
        sample(randn(2, 4, 5), randint(0, 5, (2, 4, 1)), batch_dims=2),
    ],
    symmetry=Symmetry.LINEAR,
)
def gather_nd(x: torch.Tensor, indices: torch.Tensor, *, batch_dims: int = 0) -> torch.Tensor:
    """The last axis of ``indices`` holds one position per looked-up axis; ``batch_dims`` shared axes precede those."""
    shared = []
    for axis in range(batch_dims):
        place = torch.arange(x.shape[axis], device=x.device)
        shared.append(place.reshape([-1] + [1] * (indices.dim() - 2 - axis)))
    return torch.ops.aten.index.Tensor(x, shared + list(indices.unbind(-1)))  # type: ignore[no-any-return]


# -- writing -----------------------------------------------------------------------------------------------------------


def _write_values(call: Call, values: Axes, target: Axes, places: Axes) -> None:
    """Values broadcast over the entries they are written to; the places written to keep their indices."""
    for extent in places:
        call.role("whole", extent)
    for own, other in zip(reversed(values), reversed(target), strict=False):
        if not same(size_of(own), 1):
            call.unify(own, other)
            carried(call, [own])


def _index_put_rule(call: Call) -> Axes:
    target, places = _layout(call, call.axes[2:])
    _write_values(call, call.operand(1), target, places)
    return list(call.operand(0))


def _put_masked(build: Builder, x: Value, mask: Value, before: int, values: Value) -> Value:
    """``x[..., mask] = values`` where every hit gets the same values: a choice per entry, whatever the mask holds."""
    after = x.rank - before - mask.rank
    if values.rank == after + 1 and same(values.shape[0], 1):
        values = build.squeeze(values, dims=(0,))
    if values.rank > after:
        raise OperatorError("writing several values where a mask says so depends on data")
    for _ in range(after):
        mask = build.unsqueeze(mask, dim=mask.rank)
    return build.where(mask, values, x)  # type: ignore[no-any-return]


def _index_put(
    build: Builder, x: Value, indices: Indices, values: Value, accumulate: bool = False, unsafe: bool = False
) -> Value:
    given = [place for place, index in enumerate(indices) if index is not None]
    first = indices[given[0]] if len(given) == 1 else None
    if first is not None and first.dtype == torch.bool and not accumulate:
        return _put_masked(build, x, first, given[0], values)
    positions = positions_only(indices)
    if not positions:
        return build.add(x, values) if accumulate else build.expand(values, shape=x.shape)  # type: ignore[no-any-return]
    return build.index_put(x, values, *positions, accumulate=accumulate)  # type: ignore[no-any-return]


@operator(
    rule=_index_put_rule,
    aten=dict.fromkeys(("index_put", "_unsafe_index_put", "_index_put_impl"), _index_put),
    samples=lambda: [
        sample(randn(5, 3), randn(2, 3), torch.tensor([1, 4])),
        sample(randn(5, 3), randn(1), torch.tensor([1, 4]), accumulate=True),
        sample(randn(2, 5, 6, 3), randn(2, 4, 3), None, torch.tensor([0, 2, 1, 3]), torch.tensor([5, 1, 2, 2])),
        sample(randn(5, 3, 6), randn(4, 3), torch.tensor([0, 2, 1, 3]), None, torch.tensor(2)),
    ],
    symmetry=Symmetry.LINEAR,
)
def index_put(
    x: torch.Tensor, values: torch.Tensor, *indices: torch.Tensor | None, accumulate: bool = False
) -> torch.Tensor:
    return torch.ops.aten.index_put.default(x, list(indices), values, accumulate)  # type: ignore[no-any-return]


def _scatter_nd_rule(call: Call) -> Axes:
    axes, indices, updates = call.operand(0), list(call.operand(1)), call.operand(2)
    last = indices.pop()
    depth = size_of(last)
    assert isinstance(depth, int)
    call.role("whole", last)
    for extent in axes[:depth]:
        call.role("indexed", extent)
    for extent in indices:
        call.role("whole", extent)
    for own, other in zip(updates, [*indices, *axes[depth:]], strict=True):
        call.unify(own, other)
    if call["reduction"] in ("none", "add"):
        carried(call, axes[depth:])
    return list(axes)


def _scatter_nd_symmetry(node: Node) -> Symmetry:
    by_reduction = {"none": Symmetry.LINEAR, "add": Symmetry.LINEAR, "mul": Symmetry.POINTWISE}
    return by_reduction.get(node.attributes["reduction"], Symmetry.HOMOGENEOUS)


def _onnx_scatter_nd(build: Builder, call: Any) -> Value:
    x, indices, updates = call.operand(0), call.operand(1), call.operand(2)
    if not isinstance(indices.shape[-1], int):
        raise OperatorError("how many axes ScatterND looks up depends on data")
    return build.scatter_nd(x, indices, updates, reduction=call.attribute("reduction", "none"))  # type: ignore[no-any-return]


@operator(
    rule=_scatter_nd_rule,
    spell=lambda onnx, node: onnx.ScatterND(
        *onnx.operands(3), reduction=None if node.attributes["reduction"] == "none" else node.attributes["reduction"]
    ),
    onnx={"ScatterND": OnnxForm(read=_onnx_scatter_nd, write=holds_no_sizes)},
    samples=lambda: [
        sample(randn(5, 3), torch.tensor([[1], [4]]), randn(2, 3)),
        sample(randn(5, 6, 3), torch.tensor([[1, 2], [4, -1]]), randn(2, 3), reduction="add"),
        sample(randn(5, 3), torch.tensor([[1], [-1]]), randn(2, 3), reduction="max"),
        sample(randn(5, 3), torch.tensor([[1, 1], [4, 2]]), randn(2), reduction="mul"),
        sample(randn(5, 3), torch.tensor([[1], [4]]), randn(2, 3), reduction="mul"),
    ],
    symmetry=_scatter_nd_symmetry,
)
def scatter_nd(
    x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, *, reduction: str = "none"
) -> torch.Tensor:
    """``reduction`` is none, add, mul, max or min."""
    places = list(indices.unbind(-1))
    if reduction in ("none", "add"):
        return torch.ops.aten.index_put.default(x, places, updates, reduction == "add")  # type: ignore[no-any-return]
    row = torch.zeros_like(places[0])
    for size, place in zip(x.shape, places, strict=False):
        row = row * size + torch.remainder(place, size)
    rows = x.reshape(math.prod(x.shape[: len(places)]), math.prod(x.shape[len(places) :]))
    index = row.reshape(-1, 1).expand(-1, rows.shape[1])
    how = {"mul": "prod", "max": "amax", "min": "amin"}[reduction]
    return rows.scatter_reduce(0, index, updates.reshape(index.shape), how).reshape(x.shape)
