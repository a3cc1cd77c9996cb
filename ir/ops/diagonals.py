"""Diagonals and triangles: operators for which the two axes of a matrix count together."""

from __future__ import annotations

from typing import Any

import torch
from torch import randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Value
from regauge.ir.operator import Symmetry, operator, sample
from regauge.ir.ops.layout import axis_number
from regauge.ir.sizes.expressions import Size


def _triangle_rule(call: Call) -> Axes:
    axes = call.operand(0)
    for extent in axes[-2:]:
        call.role("whole", extent)
    return list(axes)


def _triangle(name: str) -> Any:
    def adapt(build: Builder, x: Value, diagonal: Size = 0) -> Any:
        return build(name, x, diagonal=diagonal)

    return adapt


def _triangle_indices(upper: bool) -> Any:
    def adapt(build: Builder, row: Size, col: Size, offset: int = 0, *, dtype: Any = None, **_options: Any) -> Any:
        if not isinstance(row, int) or not isinstance(col, int):
            raise OperatorError("the indices of a triangle of dynamic size depend on the input")
        found = torch.triu_indices(row, col, offset) if upper else torch.tril_indices(row, col, offset)
        return build.constant(found.to(dtype or torch.int64), "triangle")

    return adapt


def _onnx_trilu(build: Builder, call: Any) -> Any:
    sizes = call.sizes(1) if call.has(1) else (0,)
    diagonal = sizes[0] if sizes is not None else call.number(1)
    if diagonal is None:
        raise OperatorError("the diagonal of Trilu is computed from data")
    return build("triu" if call.attribute("upper", 1) else "tril", call.operand(0), diagonal=diagonal)


@operator(
    rule=_triangle_rule,
    aten={"tril": _triangle("tril"), "tril_indices": _triangle_indices(upper=False)},
    spell=lambda onnx, node: onnx.Trilu(onnx.operand(0), onnx.constant(node.attributes["diagonal"]), upper=0),
    samples=lambda: [sample(randn(4, 4)), sample(randn(2, 3, 5), diagonal=-1)],
    symmetry=Symmetry.LAYOUT,
)
def tril(x: torch.Tensor, *, diagonal: int = 0) -> torch.Tensor:
    return torch.tril(x, diagonal)


@operator(
    rule=_triangle_rule,
    aten={"triu": _triangle("triu"), "triu_indices": _triangle_indices(upper=True)},
    onnx={"Trilu": _onnx_trilu},
    spell=lambda onnx, node: onnx.Trilu(onnx.operand(0), onnx.constant(node.attributes["diagonal"]), upper=1),
    samples=lambda: [sample(randn(4, 4)), sample(randn(2, 3, 5), diagonal=1)],
    symmetry=Symmetry.LAYOUT,
)
def triu(x: torch.Tensor, *, diagonal: int = 0) -> torch.Tensor:
    return torch.triu(x, diagonal)


def _diagonal_rule(call: Call) -> Axes:
    axes = call.operand(0)
    pair = {call.normal(call["dim1"], len(axes)), call.normal(call["dim2"], len(axes))}
    taken = call.fresh(call.node.outputs[0].shape[-1])
    for extent in (*(axes[d] for d in pair), taken):
        call.role("whole", extent)
    return [*(extent for d, extent in enumerate(axes) if d not in pair), taken]


def _diagonal(build: Builder, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    dims = {"dim1": axis_number(dim1, x.rank), "dim2": axis_number(dim2, x.rank)}
    return build.diagonal(x, offset=offset, **dims)


def _linalg_diagonal(build: Builder, A: Value, *, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:  # noqa: N803
    return _diagonal(build, A, offset, dim1, dim2)


@operator(
    rule=_diagonal_rule,
    aten={"diagonal": _diagonal, "linalg_diagonal": _linalg_diagonal},
    samples=lambda: [
        sample(randn(3, 4)),
        sample(randn(2, 4, 3), offset=-1, dim1=1, dim2=-1),
        sample(randn(3, 2, 3), dim2=2),
    ],
    symmetry=Symmetry.LAYOUT,
)
def diagonal(x: torch.Tensor, *, offset: int = 0, dim1: int = 0, dim2: int = 1) -> torch.Tensor:
    return torch.diagonal(x, offset, dim1, dim2)


def _diag_embed_rule(call: Call) -> Axes:
    axes = list(call.operand(0))
    shape = call.node.outputs[0].shape
    pair = sorted({call.normal(call["dim1"], len(shape)), call.normal(call["dim2"], len(shape))})
    call.role("whole", axes.pop())
    for d in pair:
        axes.insert(d, call.fresh(shape[d]))
        call.role("whole", axes[d])
    return axes


def _diag_embed(build: Builder, x: Value, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    dims = {"dim1": axis_number(dim1, x.rank + 1), "dim2": axis_number(dim2, x.rank + 1)}
    return build.diag_embed(x, offset=offset, **dims)


def _diag(build: Builder, x: Value, diagonal: int = 0) -> Any:
    return _diag_embed(build, x, diagonal) if x.rank == 1 else _diagonal(build, x, diagonal)


@operator(
    rule=_diag_embed_rule,
    aten={"diag_embed": _diag_embed, "diag": _diag},
    samples=lambda: [sample(randn(2, 3)), sample(randn(3), offset=1), sample(randn(2, 3), dim1=0, dim2=2)],
    symmetry=Symmetry.LAYOUT,
)
def diag_embed(x: torch.Tensor, *, offset: int = 0, dim1: int = -2, dim2: int = -1) -> torch.Tensor:
    return torch.diag_embed(x, offset, dim1, dim2)
