"""Joining: concatenation, stacking and repetition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import Concat, Product, resolve
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.operator import OnnxForm, Symmetry, operator, sample
from regauge.ir.ops.layout import axis_number, raise_rank
from regauge.ir.sizes.expressions import Size, product

# -- concat ------------------------------------------------------------------------------------------------------------


def _concat_rule(call: Call) -> Axes:
    operands = [axes for axes in call.axes if axes is not None]
    rank = len(operands[0])
    axis = call.normal(call["dim"], rank)
    result: Axes = []
    for position in range(rank):
        if position == axis:
            result.append(resolve(Concat([axes[position] for axes in operands])))
            continue
        for axes in operands[1:]:
            call.unify(operands[0][position], axes[position])
        result.append(operands[0][position])
    return result


def _cat(build: Builder, tensors: Sequence[Value], dim: int = 0) -> Any:
    # torch skips legacy empty tensors of shape (0,)
    full = [t for t in tensors if t.shape != (0,)] or list(tensors)[:1]
    return build.concat(*full, dim=axis_number(dim, full[0].rank))


def _hstack(build: Builder, tensors: Sequence[Value]) -> Any:
    raised = [raise_rank(build, t, 1) for t in tensors]
    return _cat(build, raised, dim=0 if raised[0].rank == 1 else 1)


def _vstack(build: Builder, tensors: Sequence[Value]) -> Any:
    return _cat(build, [raise_rank(build, t, 2) for t in tensors], dim=0)


def _dstack(build: Builder, tensors: Sequence[Value]) -> Any:
    return _cat(build, [raise_rank(build, t, 3) for t in tensors], dim=2)


def _column_stack(build: Builder, tensors: Sequence[Value]) -> Any:
    columns = [t if t.rank > 1 else build.reshape(t, shape=(product(t.shape), 1)) for t in tensors]
    return _cat(build, columns, dim=1)


def _onnx_concat(build: Builder, call: Any) -> Any:
    tensors = [call.operand(i) for i in range(call.count)]
    # opset 1 had a default axis of 1
    return build.concat(*tensors, dim=axis_number(call.attribute("axis", 1), tensors[0].rank))


def _concat_shape(first: Value, *others: Value, dim: int) -> list[Size] | None:
    axis = axis_number(dim, first.rank)
    alike = all(
        other.rank == first.rank and all(a == axis or other.shape[a] == first.shape[a] for a in range(first.rank))
        for other in others
    )
    total: Any = sum(value.shape[axis] for value in (first, *others))
    return [total if a == axis else size for a, size in enumerate(first.shape)] if alike else None


@operator(
    rule=_concat_rule,
    shape=_concat_shape,
    aten={
        "cat": _cat, "concat": _cat, "concatenate": _cat, "hstack": _hstack, "vstack": _vstack, "row_stack": _vstack,
        "dstack": _dstack, "column_stack": _column_stack,
    },
    onnx={"Concat": _onnx_concat},
    spell=lambda onnx, node: onnx.Concat(
        *onnx.all_operands(onnx.common_type),
        axis=axis_number(node.attributes["dim"], node.outputs[0].rank),
    ),
    samples=lambda: [
        sample(randn(2, 3, 4), randn(2, 5, 4), dim=1),
        sample(randn(2, 3), randn(2, 3), dim=-1),
        sample(randn(2, 3), dim=0),
        sample(randn(2), randn(1), randn(3), dim=0),
    ],
    symmetry=Symmetry.LAYOUT,
    element=lambda *tensors, dim: scalars.joined(*tensors),
)  # fmt: skip
def concat(*tensors: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat(tensors, dim)


# -- stack -------------------------------------------------------------------------------------------------------------


def _stack_rule(call: Call) -> Axes:
    operands = [axes for axes in call.axes if axes is not None]
    for axes in operands[1:]:
        for a, b in zip(operands[0], axes, strict=True):
            call.unify(a, b)
    result = list(operands[0])
    stacked = call.fresh(len(operands))
    call.role("whole", stacked)
    result.insert(call.normal(call["dim"], len(result) + 1), stacked)
    return result


def _stack(build: Builder, tensors: Sequence[Value], dim: int = 0) -> Any:
    return build.stack(*tensors, dim=dim % (tensors[0].rank + 1))


def _spell_stack(onnx: Any, node: Node) -> Any:
    axis = node.attributes["dim"] % node.outputs[0].rank
    pieces = [onnx.unsqueeze(piece, axis) for piece in onnx.all_operands(onnx.common_type)]
    return onnx.Concat(*pieces, axis=axis)


@operator(
    rule=_stack_rule,
    aten={"stack": _stack},
    spell=_spell_stack,
    samples=lambda: [
        sample(randn(2, 3), randn(2, 3), dim=0),
        sample(randn(2, 3), randn(2, 3), randn(2, 3), dim=-1),
        sample(randn(4), dim=1),
    ],
    symmetry=Symmetry.LAYOUT,
)
def stack(*tensors: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.stack(tensors, dim)


# -- repetition --------------------------------------------------------------------------------------------------------


def _repeat_rule(call: Call) -> Axes:
    """``a -> (r a)`` per axis, with r a fresh Dim whose size is the number of repeats."""
    axes, repeats = call.operand(0), [call.fresh(r) for r in call["repeats"]]
    call.derive(repeats=tuple(repeats))
    new = len(repeats) - len(axes)
    return [*repeats[:new], *(resolve(Product((r, a))) for r, a in zip(repeats[new:], axes, strict=True))]


def _tile(build: Builder, x: Value, dims: Sequence[Size]) -> Any:
    return build.repeat(x, repeats=(1,) * (x.rank - len(dims)) + tuple(dims))


def _onnx_tile(build: Builder, call: Any) -> Any:
    repeats = call.sizes(1)
    if repeats is None:
        raise OperatorError("the repeats of Tile are computed from data")
    return build.repeat(call.operand(0), repeats=tuple(repeats))


def _spell_repeat(onnx: Any, node: Node) -> Any:
    x, repeats = node.inputs[0], node.attributes["repeats"]
    assert isinstance(x, Value)
    return onnx.Tile(onnx.unsqueeze(onnx.operand(0), *range(len(repeats) - x.rank)), onnx.sizes(repeats))


def _spell_repeat_interleave(onnx: Any, node: Node) -> Any:
    """Every entry is looked up as often as it is there; in an axis of dynamic size it is repeated in one of its own."""
    shape, x, copies = node.outputs[0].shape, node.inputs[0], node.attributes["repeats"]
    assert isinstance(x, Value)
    axis = axis_number(node.attributes["dim"], len(shape))
    if isinstance(x.shape[axis], int) and isinstance(copies, int):
        table = torch.arange(x.shape[axis]).repeat_interleave(copies)
        return onnx.Gather(onnx.operand(0), onnx.constant(table, torch.int32), axis=axis)
    repeats = [1] * (len(shape) + 1)
    repeats[axis + 1] = copies
    spread = onnx.Tile(onnx.unsqueeze(onnx.operand(0), axis + 1), onnx.sizes(repeats))
    return onnx.Reshape(spread, onnx.target(shape, x.shape[:axis]))


def _write_tile(nodes: Sequence[Node], patch: Any) -> None:
    patch.set_sizes(1, nodes[0].attributes["repeats"])


@operator(
    rule=_repeat_rule,
    aten={"repeat": lambda build, x, repeats: build.repeat(x, repeats=tuple(repeats)), "tile": _tile},
    onnx={"Tile": OnnxForm(read=_onnx_tile, write=_write_tile)},
    spell=_spell_repeat,
    samples=lambda: [
        sample(randn(2, 3), repeats=(1, 2)),
        sample(randn(3), repeats=(2, 2)),
        sample(randn(1, 4), repeats=(3, 1)),
        sample(randn(()), repeats=(3,)),
    ],
    symmetry=Symmetry.LAYOUT,
)
def repeat(x: torch.Tensor, *, repeats: tuple[int, ...]) -> torch.Tensor:
    return x.repeat(repeats)


def _repeat_interleave_rule(call: Call) -> Axes:
    """``a -> (a r)``: every entry is followed by its copies."""
    axes, copies = list(call.operand(0)), call.fresh(call["repeats"])
    call.derive(repeats=copies)
    dim = call.normal(call["dim"], len(axes))
    axes[dim] = resolve(Product((axes[dim], copies)))
    return axes


def _repeat_interleave(
    build: Builder, x: Value, repeats: Any, dim: int | None = None, *, output_size: Size | None = None
) -> Any:
    if dim is None:
        x, dim = build.reshape(x, shape=(product(x.shape),)), 0
    dim = axis_number(dim, x.rank)
    if not isinstance(repeats, Value):
        return build.repeat_interleave(x, repeats=repeats, dim=dim)
    size = x.shape[dim]
    if not isinstance(repeats, Parameter) or repeats.kind != "constant" or not isinstance(size, int):
        raise OperatorError("repeat_interleave with computed repeats has a size that depends on data")
    table = torch.repeat_interleave(torch.arange(size), repeats.tensor.expand(size))
    return build.index_select(x, build.constant(table, "repeats"), dim=dim)


@operator(
    rule=_repeat_interleave_rule,
    aten={"repeat_interleave.self_int": _repeat_interleave, "repeat_interleave.self_Tensor": _repeat_interleave},
    spell=_spell_repeat_interleave,
    samples=lambda: [sample(randn(2, 3), repeats=2, dim=1), sample(randn(2, 3, 4), repeats=3, dim=-2)],
    symmetry=Symmetry.LAYOUT,
    element=lambda x, **_: x,
)
def repeat_interleave(x: torch.Tensor, *, repeats: int, dim: int) -> torch.Tensor:
    return x.repeat_interleave(repeats, dim)
