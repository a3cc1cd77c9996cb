"""Splitting: cutting tensors into several pieces along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import OnnxForm, Symmetry, operator, sample
from regauge.ir.ops.data_sizes import split_computed_into
from regauge.ir.ops.layout import axis_number
from regauge.ir.ops.slice_bounds import bound
from regauge.ir.sizes.expressions import Size, divide, floor_divide, same, simplify

# -- split -------------------------------------------------------------------------------------------------------------


def _split_rule(call: Call) -> list[Axes]:
    axes = call.operand(0)
    dim = call.normal(call["dim"], len(axes))
    parts = call.split(axes[dim], call["sizes"])
    call.derive(sizes=tuple(parts))
    return [[*axes[:dim], part, *axes[dim + 1 :]] for part in parts]


def split_into(build: Builder, x: Value, sizes: Sequence[Size], dim: int) -> tuple[Value, ...]:
    """The pieces of ``x`` as a tuple, also where there is one only."""
    pieces = build.split(x, sizes=tuple(sizes), dim=dim)
    return (pieces,) if isinstance(pieces, Value) else tuple(pieces)


def _equal_parts(size: Size, part: Size) -> list[Size]:
    """``size`` in parts of ``part``, the last one smaller; raises OperatorError where their number is not known."""
    count = divide(size, part)
    if isinstance(count, int):
        return [part] * count
    if not isinstance(size, int) or not isinstance(part, int):
        raise OperatorError(f"an axis of size {size} is split into parts of {part}: their number depends on the input")
    return [part] * (size // part) + [size % part]


def _split(build: Builder, x: Value, size: Size | Sequence[Size], dim: int = 0) -> tuple[Value, ...]:
    dim = axis_number(dim, x.rank)
    sizes = size if isinstance(size, list | tuple) else _equal_parts(x.shape[dim], size)
    if any(isinstance(size, Value) for size in sizes):
        return split_computed_into(build, x, sizes, dim)
    return split_into(build, x, sizes, dim)


def _chunk(build: Builder, x: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    dim = axis_number(dim, x.rank)
    size = x.shape[dim]
    part = -(-size // chunks) if isinstance(size, int) else divide(size, chunks)
    if part is None:
        raise OperatorError(f"an axis of size {size} is cut into {chunks} chunks: their number depends on the input")
    return split_into(build, x, _equal_parts(size, part), dim)


def _tensor_split(build: Builder, x: Value, sections: int | Sequence[int], dim: int = 0) -> tuple[Value, ...]:
    dim = axis_number(dim, x.rank)
    size = x.shape[dim]
    if isinstance(sections, Value):
        raise OperatorError("tensor_split at computed places has sizes that depend on data")
    if isinstance(sections, int):
        part = floor_divide(size, sections)
        extra = simplify(size - part * sections)
        if not isinstance(extra, int):
            raise OperatorError(
                f"an axis of size {size} is split into {sections} sections: their sizes depend on the input"
            )
        return split_into(build, x, [part + (i < extra) for i in range(sections)], dim)
    places = [0, *(bound(place, size) for place in sections), size]
    return split_into(build, x, [simplify(b - a) for a, b in zip(places, places[1:], strict=False)], dim)


def _onnx_split(build: Builder, call: Any) -> tuple[Value, ...]:
    x = call.operand(0)
    dim = axis_number(call.attribute("axis", 0), x.rank)
    sizes = call.sizes(1) if call.has(1) else call.attribute("split")
    if sizes is None and call.has(1):
        raise OperatorError("the sizes of Split are computed from data")
    if sizes is None:
        count = call.attribute("num_outputs") or call.outputs
        size = x.shape[dim]
        part = -(-size // count) if isinstance(size, int) else floor_divide(size, count)
        # the last chunk is smaller where the size does not divide (since opset 18)
        sizes = [part] * (count - 1) + [simplify(size - part * (count - 1))]
    return split_into(build, x, sizes, dim)


def _write_split(nodes: Sequence[Node], patch: Any) -> None:
    node, origin = nodes[0], nodes[0].origin
    sizes = node.attributes["sizes"]
    as_input = len(origin.inputs) > 1 and origin.inputs[1] is not None
    if not as_input and "split" not in origin.attributes and all(same(size, sizes[0]) for size in sizes):
        return  # equal parts need no sizes
    if "split" in origin.attributes:
        patch.attribute("split", list(sizes))
        return
    if "num_outputs" in origin.attributes:
        patch.attribute("num_outputs", None)
    patch.set_sizes(1, sizes)


def _spell_split(onnx: Any, node: Node) -> Any:
    """The sizes are an attribute before opset 13."""
    x, sizes = node.inputs[0], node.attributes["sizes"]
    assert isinstance(x, Value)
    axis = axis_number(node.attributes["dim"], x.rank)
    if len(sizes) == 1:
        return onnx.Identity(onnx.operand(0))
    if onnx.opset < 13:
        return onnx.Split(onnx.operand(0), outputs=len(sizes), axis=axis, split=sizes)
    return onnx.Split(onnx.operand(0), onnx.sizes(sizes), outputs=len(sizes), axis=axis)


def _spell_unbind(onnx: Any, node: Node) -> Any:
    x = node.inputs[0]
    assert isinstance(x, Value)
    axis = axis_number(node.attributes["dim"], x.rank)
    operand = onnx.operand(0)
    return tuple(onnx.Gather(operand, onnx.constant(index), axis=axis) for index in range(len(node.outputs)))


def _onnx_split_to_sequence(build: Builder, call: Any) -> tuple[Value, ...]:
    """The pieces in order; the frontend makes the sequence of them. The sizes are a list, or one size for all."""
    x = call.operand(0)
    dim = axis_number(call.attribute("axis", 0), x.rank)
    if not call.has(1):
        pieces = split_into(build, x, _equal_parts(x.shape[dim], 1), dim)
        return pieces if call.attribute("keepdims", 1) else tuple(build.squeeze(p, dims=(dim,)) for p in pieces)
    sizes = call.sizes(1)
    if sizes is None:
        raise OperatorError("the sizes of SplitToSequence are computed from data")
    one = call.entry(1).shape == ()
    return split_into(build, x, _equal_parts(x.shape[dim], sizes[0]) if one else sizes, dim)


def _write_split_to_sequence(nodes: Sequence[Node], patch: Any) -> None:
    sizes = nodes[0].attributes["sizes"]
    shape = nodes[0].origin.inputs[1].shape
    equal = all(same(size, sizes[0]) for size in sizes)
    patch.set_sizes(1, sizes[0] if equal and shape is not None and len(shape) == 0 else sizes)


@operator(
    rule=_split_rule,
    aten={
        "split": _split, "split_with_sizes": _split, "unsafe_split": _split, "unsafe_split_with_sizes": _split,
        "chunk": _chunk, "unsafe_chunk": _chunk, "tensor_split": _tensor_split,
        "hsplit": lambda build, x, at: _tensor_split(build, x, at, 0 if x.rank == 1 else 1),
        "vsplit": lambda build, x, at: _tensor_split(build, x, at, 0),
        "dsplit": lambda build, x, at: _tensor_split(build, x, at, 2),
    },
    onnx={
        "Split": OnnxForm(read=_onnx_split, write=_write_split),
        "SplitToSequence": OnnxForm(read=_onnx_split_to_sequence, write=_write_split_to_sequence),
    },
    spell=_spell_split,
    samples=lambda: [
        sample(randn(2, 7), sizes=(3, 4), dim=1),
        sample(randn(6, 3), sizes=(2, 2, 2), dim=-2),
        sample(randn(4), sizes=(4,), dim=0),
        sample(randn(2, 5, 3), sizes=(1, 4), dim=1),
    ],
    symmetry=Symmetry.LAYOUT,
)  # fmt: skip
def split(x: torch.Tensor, *, sizes: tuple[int, ...], dim: int) -> tuple[torch.Tensor, ...]:
    return torch.split(x, list(sizes), dim)


# -- unbind ------------------------------------------------------------------------------------------------------------


def _unbind_rule(call: Call) -> list[Axes]:
    axes = list(call.operand(0))
    call.role("whole", axes.pop(call.normal(call["dim"], len(axes))))
    return [list(axes) for _ in call.node.outputs]


def _unbind(build: Builder, x: Value, dim: int = 0) -> tuple[Value, ...]:
    dim = axis_number(dim, x.rank)
    if not isinstance(x.shape[dim], int):
        raise OperatorError(f"unbind of an axis of the dynamic size {x.shape[dim]} has an unknown number of results")
    pieces = build.unbind(x, dim=dim)
    return (pieces,) if isinstance(pieces, Value) else tuple(pieces)


@operator(
    rule=_unbind_rule,
    aten={"unbind": _unbind},
    spell=_spell_unbind,
    samples=lambda: [sample(randn(2, 3, 4), dim=0), sample(randn(2, 3), dim=-1), sample(randn(2), dim=0)],
    symmetry=Symmetry.LAYOUT,
)
def unbind(x: torch.Tensor, *, dim: int) -> tuple[torch.Tensor, ...]:
    return torch.unbind(x, dim)
