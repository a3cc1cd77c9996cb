"""Broadcasting: axes of size one, put in, taken out and expanded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import ONE, size_of
from regauge.ir.edit import Builder
from regauge.ir.errors import AxisError, OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import OnnxForm, Symmetry, operator, sample
from regauge.ir.sizes.expressions import Size, product, same, simplify, unclamped

# -- axes of size one --------------------------------------------------------------------------------------------------


def _unsqueeze_rule(call: Call) -> Axes:
    axes = list(call.operand(0))
    axes.insert(call.normal(call["dim"], len(axes) + 1), ONE)
    return axes


def _onnx_unsqueeze(build: Builder, call: Any) -> Any:
    x = call.operand(0)
    axes = call.sizes(1) if call.has(1) else call.attribute("axes")
    if axes is None:
        raise OperatorError("the axes of Unsqueeze are computed from data")
    rank = x.rank + len(axes)
    for axis in sorted(int(a) % rank for a in axes):
        x = build.unsqueeze(x, dim=axis)
    return x


@operator(
    rule=_unsqueeze_rule,
    aten={"unsqueeze": lambda build, x, dim: build.unsqueeze(x, dim=dim % (x.rank + 1))},
    onnx={"Unsqueeze": _onnx_unsqueeze},
    spell=lambda onnx, node: onnx.unsqueeze(onnx.operand(0), node.attributes["dim"] % node.outputs[0].rank),
    samples=lambda: [
        sample(randn(2, 3), dim=0),
        sample(randn(2, 3), dim=-1),
        sample(randn(2, 3), dim=1),
        sample(randn(()), dim=0),
    ],
    symmetry=Symmetry.LAYOUT,
    element=lambda x, **_: x,
)
def unsqueeze(x: torch.Tensor, *, dim: int) -> torch.Tensor:
    return x.unsqueeze(dim)


def _squeeze_rule(call: Call) -> Axes:
    axes = call.operand(0)
    dims = {call.normal(d, len(axes)) for d in call["dims"]}
    for d in dims:
        if not same(size_of(axes[d]), 1):
            raise AxisError(
                f"{call.where}: axis {d} has the size {size_of(axes[d])}, only axes of size 1 can be squeezed"
            )
    return [extent for i, extent in enumerate(axes) if i not in dims]


def squeeze_ones(build: Builder, x: Value, dim: int | Sequence[int] | None = None) -> Any:
    """Remove those of the given axes (all, when None) that have the size one; torch ignores the others."""
    dims = range(x.rank) if dim is None else [dim] if isinstance(dim, int) else dim
    ones = tuple(sorted({d % x.rank for d in dims if x.rank and x.shape[d] == 1}))
    return build.squeeze(x, dims=ones) if ones else x


def _onnx_squeeze(build: Builder, call: Any) -> Any:
    axes = call.sizes(1) if call.has(1) else call.attribute("axes")
    if axes is None and call.has(1):
        raise OperatorError("the axes of Squeeze are computed from data")
    x = call.operand(0)
    if axes is None:
        dynamic = [size for size in x.shape if not isinstance(size, int)]
        if dynamic:
            raise OperatorError(f"whether Squeeze removes an axis of size {dynamic[0]} is not known before it runs")
        return squeeze_ones(build, x)
    # ONNX removes an axis that is named: if its size is dynamic, it is 1 whenever the model runs
    named = sorted({int(a) % x.rank for a in axes}, reverse=True)
    for dim in [d for d in named if x.shape[d] != 1]:
        if isinstance(x.shape[dim], int):
            raise OperatorError(f"axis {dim} has the size {x.shape[dim]}, only axes of size 1 can be squeezed")
        x = build.select(x, dim=dim, index=0)
    left = tuple(sorted(d - sum(o < d for o in named if call.operand(0).shape[o] != 1) for d in named
                        if call.operand(0).shape[d] == 1))  # fmt: skip
    return build.squeeze(x, dims=left) if left else x


def _spell_squeeze(onnx: Any, node: Node) -> Any:
    x = node.inputs[0]
    assert isinstance(x, Value)
    return onnx.squeeze(onnx.operand(0), *(dim % x.rank for dim in node.attributes["dims"]))


@operator(
    rule=_squeeze_rule,
    aten={"squeeze": squeeze_ones},
    onnx={"Squeeze": _onnx_squeeze},
    spell=_spell_squeeze,
    samples=lambda: [
        sample(randn(2, 1, 3, 1), dims=(1, 3)),
        sample(randn(2, 3, 1), dims=(-1,)),
        sample(randn(1), dims=(0,)),
    ],
    symmetry=Symmetry.LAYOUT,
    element=lambda x, **_: x,
)
def squeeze(x: torch.Tensor, *, dims: tuple[int, ...]) -> torch.Tensor:
    return x.squeeze(dims)


# -- expand ------------------------------------------------------------------------------------------------------------


def _expand_rule(call: Call) -> Axes:
    """An axis of size one becomes a fresh Dim, free to be cut: all its entries are the same."""
    axes, shape = call.operand(0), call.node.outputs[0].shape
    padded = [ONE] * (len(shape) - len(axes)) + list(axes)
    result = [a if same(size_of(a), size) else call.fresh(size) for a, size in zip(padded, shape, strict=True)]
    for before, after in zip(padded, result, strict=True):
        if before is not after and not same(size_of(before), 1):
            for extent in (before, after):
                call.pin(extent, "it is expanded for some inputs, and as large already for others")
    call.derive(shape=tuple(result))
    return result


def _expand_shape(x: Value, *, shape: tuple[Size, ...]) -> tuple[Size, ...] | None:
    """What is asked for, where every axis is 1, as large, or of a size that may turn out to be either."""
    offset = len(shape) - x.rank
    if offset < 0 or any(same(size, -1) for size in shape):
        return None
    return shape if all(map(_may_expand, x.shape, shape[offset:])) else None


def _may_expand(a: Size, b: Size) -> bool:
    return same(a, 1) or same(a, b) or not isinstance(a, int) and (isinstance(b, int) or unclamped(a, b) is not None)


def expand_to(build: Builder, x: Value, size: Sequence[Size], *, implicit: bool = False) -> Any:
    """torch's ``expand``: -1 keeps a size, new axes come first."""
    offset = len(size) - x.rank
    shape = tuple(x.shape[i - offset] if i >= offset and s == -1 else simplify(s) for i, s in enumerate(size))
    return x if shape == x.shape else build.expand(x, shape=shape)


def broadcast_shape(*shapes: Sequence[Size]) -> tuple[Size, ...]:
    """The shape of a broadcast; raises OperatorError where the sizes do not tell which of two is the larger one."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Size] = [1] * rank
    for shape in shapes:
        for i, size in enumerate(shape, rank - len(shape)):
            result[i] = _broadcast_size(result[i], size)
    return tuple(result)


def _broadcast_size(a: Size, b: Size) -> Size:
    """A number other than 1 is the size whatever a dynamic one beside it turns out to be: that is equal, or 1."""
    if a == 1 or same(a, b):
        return b
    if b == 1:
        return a
    if isinstance(a, int) != isinstance(b, int):
        return a if isinstance(a, int) else b
    common = unclamped(a, b)
    if common is None:
        raise OperatorError(f"which size axes of {a} and {b} have together depends on the input")
    return common


def _broadcast_tensors(build: Builder, tensors: Sequence[Value]) -> tuple[Value, ...]:
    shape = broadcast_shape(*[t.shape for t in tensors])
    return tuple(expand_to(build, t, shape) for t in tensors)


def _meshgrid(build: Builder, tensors: Sequence[Value], *, indexing: str = "ij") -> tuple[Value, ...]:
    """Every vector on its own axis, expanded over the others; ``xy`` swaps the first two axes."""
    swap = indexing == "xy" and len(tensors) > 1
    order = [1, 0, *range(2, len(tensors))] if swap else list(range(len(tensors)))
    sizes = [product(t.shape) for t in tensors]
    shape = [sizes[i] for i in order]
    grids = []
    for i, tensor in enumerate(tensors):
        own = [sizes[i] if j == i else 1 for j in order]
        grids.append(expand_to(build, build.reshape(tensor, shape=own), shape))
    return tuple(grids)


def _onnx_expand(build: Builder, call: Any) -> Any:
    """ONNX broadcasts both ways: where the target says 1, the input's size stays."""
    x, target = call.operand(0), call.sizes(1)
    if target is None:
        raise OperatorError("the target shape of Expand is computed from data")
    return expand_to(build, x, broadcast_shape(x.shape, [1 if same(size, -1) else size for size in target]))


def _spell_expand(onnx: Any, node: Node) -> Any:
    x, shape = node.inputs[0], node.attributes["shape"]
    assert isinstance(x, Value)
    old = (1,) * (len(shape) - x.rank) + x.shape
    return onnx.Expand(onnx.operand(0), onnx.sizes([1 if same(a, b) else b for a, b in zip(old, shape, strict=True)]))


def _write_expand(nodes: Sequence[Node], patch: Any) -> None:
    x, shape = nodes[0].inputs[0], nodes[0].attributes["shape"]
    assert isinstance(x, Value)
    old = (1,) * (len(shape) - x.rank) + x.shape
    patch.set_sizes(1, [1 if same(a, b) else b for a, b in zip(old, shape, strict=True)])


@operator(
    rule=_expand_rule,
    aten={
        "expand": expand_to,
        "broadcast_to": expand_to,
        "expand_as": lambda build, x, other: expand_to(build, x, other.shape),
        "broadcast_tensors": _broadcast_tensors,
        "meshgrid": _meshgrid,
    },
    onnx={"Expand": OnnxForm(read=_onnx_expand, write=_write_expand)},
    spell=_spell_expand,
    shape=_expand_shape,
    samples=lambda: [
        sample(randn(2, 1, 4), shape=(2, 3, 4)),
        sample(randn(3), shape=(2, 3)),
        sample(randn(1, 3), shape=(4, 2, 3)),
        sample(randn(()), shape=(2,)),
    ],
    symmetry=Symmetry.LAYOUT,
    element=lambda x, **_: x,
)  # fmt: skip
def expand(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    return x.expand(shape)
