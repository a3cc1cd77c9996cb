"""Layout: operators that regroup and reorder axes. Their rules are the primitives of the algebra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import size_of
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import OnnxForm, Symmetry, operator, sample
from regauge.ir.sizes.expressions import Size, floor_divide, product, same

# -- reshape -----------------------------------------------------------------------------------------------------------


def explicit_shape(shape: Sequence[Size], target: Sequence[Size]) -> tuple[Size, ...]:
    """A reshape target with its -1 replaced by the size it stands for."""
    sizes = list(target)
    holes = [i for i, size in enumerate(sizes) if size == -1]
    if not holes:
        return tuple(sizes)
    if len(holes) > 1:
        raise OperatorError(f"the target shape {tuple(target)} leaves more than one size open: give all but one")
    rest = product(size for i, size in enumerate(sizes) if i != holes[0])
    sizes[holes[0]] = 0 if rest == 0 else floor_divide(product(shape), rest)
    return tuple(sizes)


def axis_number(dim: int, rank: int) -> int:
    """A non-negative axis number, as torch counts axes: a scalar has an axis 0 of size one."""
    rank = max(rank, 1)
    if not -rank <= dim < rank:
        raise OperatorError(
            f"axis {dim} does not exist in a tensor of rank {rank}: give one from {-rank} to {rank - 1}"
        )
    return dim % rank


def _reshape_rule(call: Call) -> Axes:
    axes = call.reshape(call.operand(0), call.node.outputs[0].shape)
    call.derive(shape=tuple(axes))
    return axes


def _view(build: Builder, x: Value, size: Sequence[Size]) -> Any:
    return build.reshape(x, shape=explicit_shape(x.shape, size))


def _view_as(build: Builder, x: Value, other: Value) -> Any:
    return build.reshape(x, shape=other.shape)


def _view_dtype(build: Builder, x: Value, dtype: Any) -> Any:
    raise OperatorError(f"view({dtype}) reads the bytes of {x} as another type: that has no rule")


def _merged(build: Builder, x: Value, start: int, end: int) -> Any:
    """``x`` with its axes start..end merged into one."""
    shape = (*x.shape[:start], product(x.shape[start : end + 1]), *x.shape[end + 1 :])
    return x if shape == x.shape else build.reshape(x, shape=shape)


def _flatten(build: Builder, x: Value, start_dim: int = 0, end_dim: int = -1) -> Any:
    return _merged(build, x, axis_number(start_dim, x.rank), axis_number(end_dim, x.rank))


def _unflatten(build: Builder, x: Value, dim: int, sizes: Sequence[Size]) -> Any:
    dim = axis_number(dim, x.rank)
    parts = explicit_shape(x.shape[dim : dim + 1], sizes)
    return build.reshape(x, shape=(*x.shape[:dim], *parts, *x.shape[dim + 1 :]))


def _channel_shuffle(build: Builder, x: Value, groups: int) -> Any:
    """``n (g c) ... -> n (c g) ...``"""
    n, channels, *rest = x.shape
    split = build.reshape(x, shape=(n, groups, floor_divide(channels, groups), *rest))
    return build.reshape(build.permute(split, dims=(0, 2, 1, *range(3, split.rank))), shape=x.shape)


def raise_rank(build: Builder, x: Value, rank: int) -> Any:
    """numpy's ``atleast_1d/2d/3d``: a vector becomes a row, a third axis comes last."""
    shape = (1,) + x.shape if x.rank == 1 and rank > 1 else x.shape
    return x if x.rank >= rank else build.reshape(x, shape=shape + (1,) * (rank - len(shape)))


def _at_least(rank: int) -> Any:
    def adapt(build: Builder, x: Any) -> Any:
        if isinstance(x, list | tuple):
            return tuple(raise_rank(build, one, rank) for one in x)
        return raise_rank(build, x, rank)

    return adapt


def _onnx_reshape(build: Builder, call: Any) -> Any:
    x = call.operand(0)
    target = call.attribute("shape") if call.opset < 5 else call.sizes(1)
    if target is None:
        raise OperatorError("the target shape of Reshape is computed from data")
    if not call.attribute("allowzero", 0):
        target = [x.shape[i] if size == 0 else size for i, size in enumerate(target)]
    return build.reshape(x, shape=explicit_shape(x.shape, target))


def _write_reshape(nodes: Sequence[Node], patch: Any) -> None:
    shape = nodes[0].attributes["shape"]
    if "shape" in nodes[0].origin.attributes:
        patch.attribute("shape", shape)
    else:
        patch.set_sizes(1, shape)


def _onnx_flatten(build: Builder, call: Any) -> Any:
    x = call.operand(0)
    axis = call.attribute("axis", 1)
    axis += x.rank if axis < 0 else 0
    return build.reshape(x, shape=(product(x.shape[:axis]), product(x.shape[axis:])))


def holds_no_sizes(nodes: Sequence[Node], patch: Any) -> None:
    """The ``write`` of ONNX operators whose results have derived sizes, but whose nodes store none of them."""


def _flatten_layer(node: Node) -> str | None:
    """``nn.Flatten`` where the reshape merges neighbouring axes and does nothing else."""
    x, shape = node.inputs[0], node.attributes["shape"]
    if not isinstance(x, Value) or len(shape) >= x.rank:
        return None
    start = 0
    while start < len(shape) - 1 and same(shape[start], x.shape[start]):  # axes of size 1 may follow the last
        start += 1
    end = start + x.rank - len(shape)
    if end >= x.rank or not same(product(x.shape[start : end + 1]), shape[start]):
        return None
    if not all(same(a, b) for a, b in zip(x.shape[end + 1 :], shape[start + 1 :], strict=True)):
        return None
    stop = "" if end == x.rank - 1 else f", {end}"
    return "nn.Flatten()" if start == 1 and not stop else f"nn.Flatten({start}{stop})"


def _reshape_shape(x: Value, *, shape: Sequence[Size]) -> Sequence[Size] | None:
    plain = all(not isinstance(size, int) or size >= 0 for size in shape)
    return shape if plain and same(product(x.shape), product(shape)) else None


@operator(
    rule=_reshape_rule,
    shape=_reshape_shape,
    aten={
        "view": _view, "reshape": _view, "_unsafe_view": _view, "view.dtype": _view_dtype, "view_as": _view_as,
        "_reshape_alias": lambda build, x, size, stride: _view(build, x, size),
        "reshape_as": _view_as, "flatten": _flatten, "ravel": _flatten, "unflatten": _unflatten,
        "channel_shuffle": _channel_shuffle, "native_channel_shuffle": _channel_shuffle,
        "atleast_1d": _at_least(1), "atleast_2d": _at_least(2), "atleast_3d": _at_least(3),
    },
    onnx={
        "Reshape": OnnxForm(read=_onnx_reshape, write=_write_reshape),
        "Flatten": OnnxForm(read=_onnx_flatten, write=holds_no_sizes),
    },
    samples=lambda: [
        sample(randn(2, 3, 8), shape=(2, 3, 2, 4)),
        sample(randn(2, 3, 4), shape=(2, 12)),
        sample(randn(6, 4), shape=(2, 3, 4)),
        sample(randn(6, 4), shape=(3, 8)),
        sample(randn(4, 6), shape=(3, 8)),
        sample(randn(1, 1, 6), shape=(6,)),
        sample(randn(()), shape=(1, 1)),
    ],
    symmetry=Symmetry.LAYOUT,
    layer=_flatten_layer,
    spell=lambda onnx, node: onnx.Reshape(
        onnx.operand(0), onnx.target(node.attributes["shape"], node.inputs[0].shape)
    ),
    element=lambda x, **_: x,
)  # fmt: skip
def reshape(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    return x.reshape(shape)


# -- permute -----------------------------------------------------------------------------------------------------------


def _permute_rule(call: Call) -> Axes:
    axes = call.operand(0)
    return [axes[call.normal(d, len(axes))] for d in call["dims"]]


def _permute(build: Builder, x: Value, dims: Sequence[int]) -> Any:
    dims = tuple(axis_number(d, x.rank) for d in dims)
    return x if dims == tuple(range(x.rank)) else build.permute(x, dims=dims)


def _transpose(build: Builder, x: Value, dim0: int, dim1: int) -> Any:
    dims = list(range(x.rank))
    if dims:
        dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return _permute(build, x, dims)


def _reversed(build: Builder, x: Value) -> Any:
    return _permute(build, x, range(x.rank)[::-1])


def _movedim(build: Builder, x: Value, source: int | Sequence[int], destination: int | Sequence[int]) -> Any:
    taken = [axis_number(d, x.rank) for d in ([source] if isinstance(source, int) else source)]
    places = [axis_number(d, x.rank) for d in ([destination] if isinstance(destination, int) else destination)]
    rest = iter(d for d in range(x.rank) if d not in taken)
    at = dict(zip(places, taken, strict=True))
    return _permute(build, x, [at[i] if i in at else next(rest) for i in range(x.rank)])


def _onnx_transpose(build: Builder, call: Any) -> Any:
    x = call.operand(0)
    return build.permute(x, dims=call.attribute("perm") or tuple(range(x.rank))[::-1])


def _permute_shape(x: Value, *, dims: Sequence[int]) -> tuple[Size, ...] | None:
    order = [axis_number(dim, x.rank) for dim in dims]
    return tuple(x.shape[dim] for dim in order) if sorted(order) == list(range(x.rank)) else None


@operator(
    rule=_permute_rule,
    shape=_permute_shape,
    aten={
        "permute": _permute, "transpose": _transpose, "swapaxes": _transpose, "swapdims": _transpose, "t": _reversed,
        "numpy_T": _reversed, "mT": lambda build, x: _transpose(build, x, -2, -1),
        "matrix_H": lambda build, x: _transpose(build, build.conj(x) if x.dtype.is_complex else x, -2, -1),
        "movedim": _movedim, "moveaxis": _movedim,
    },
    onnx={"Transpose": _onnx_transpose},
    spell=lambda onnx, node: onnx.Transpose(
        onnx.operand(0), perm=[dim % len(node.attributes["dims"]) for dim in node.attributes["dims"]]
    ),
    samples=lambda: [
        sample(randn(2, 3, 4), dims=(2, 0, 1)),
        sample(randn(2, 3), dims=(-1, 0)),
        sample(randn(3), dims=(0,)),
    ],
    symmetry=Symmetry.LAYOUT,
    element=lambda x, **_: x,
)  # fmt: skip
def permute(x: torch.Tensor, *, dims: tuple[int, ...]) -> torch.Tensor:
    return x.permute(dims)


# -- reorderings of one axis -------------------------------------------------------------------------------------------


def _reordered(call: Call, dims: Sequence[int]) -> Axes:
    """Axes whose indices change places: both sides keep all of them."""
    axes = list(call.operand(0))
    for dim in {call.normal(d, len(axes)) for d in dims}:
        moved = call.fresh(size_of(axes[dim]))
        call.role("whole", axes[dim])
        call.role("whole", moved)
        axes[dim] = moved
    return axes


def _spell_flip(onnx: Any, node: Node) -> Any:
    dims = list(node.attributes["dims"])
    first, last, steps = [-1] * len(dims), [-(2**63) + 1] * len(dims), [-1] * len(dims)
    return onnx.Slice(onnx.operand(0), *(onnx.sizes(numbers) for numbers in (first, last, dims, steps)))


def _rot90(build: Builder, x: Value, k: int = 1, dims: Sequence[int] = (0, 1)) -> Any:
    first, second = axis_number(dims[0], x.rank), axis_number(dims[1], x.rank)
    turned = {0: (), 1: (second,), 2: (first, second), 3: (first,)}[k % 4]
    x = build.flip(x, dims=turned) if turned else x
    return _transpose(build, x, first, second) if k % 2 else x


@operator(
    rule=lambda call: _reordered(call, call["dims"]),
    aten={
        "rot90": _rot90,
        "flip": lambda build, x, dims: build.flip(x, dims=tuple(axis_number(d, x.rank) for d in dims)),
        "fliplr": lambda build, x: build.flip(x, dims=(1,)),
        "flipud": lambda build, x: build.flip(x, dims=(0,)),
    },
    samples=lambda: [sample(randn(2, 3, 4), dims=(1,)), sample(randn(2, 3), dims=(0, -1))],
    symmetry=Symmetry.LAYOUT,
    spell=_spell_flip,
    element=lambda x, dims: scalars.moved(
        x, {dim: scalars.Place(((scalars.Along(dim), -1),), offset=-1, lengths=1) for dim in dims}
    ),
)
def flip(x: torch.Tensor, *, dims: tuple[int, ...]) -> torch.Tensor:
    return x.flip(dims)


def _roll(build: Builder, x: Value, shifts: Size | Sequence[Size], dims: int | Sequence[int] = ()) -> Any:
    amounts = tuple(shifts) if isinstance(shifts, list | tuple) else (shifts,)
    axes = tuple(axis_number(d, x.rank) for d in ([dims] if isinstance(dims, int) else dims))
    if axes:
        return build.roll(x, shifts=amounts, dims=axes)
    flat = build.roll(build.reshape(x, shape=(product(x.shape),)), shifts=amounts, dims=(0,))
    return build.reshape(flat, shape=x.shape)


def _spell_roll(onnx: Any, node: Node) -> Any:
    """The last entries of each axis are put in front."""
    x, y = node.inputs[0], onnx.operand(0)
    assert isinstance(x, Value)
    for shift, dim in zip(node.attributes["shifts"], node.attributes["dims"], strict=True):
        axis = axis_number(dim, x.rank)
        size = x.shape[axis]
        if not isinstance(size, int) or not isinstance(shift, int):
            raise onnx.refusal(f"an axis of the size {size} is rolled by {shift}")
        place = -shift % size
        first, last = (
            onnx.Slice(y, onnx.sizes([start]), onnx.sizes([end]), onnx.sizes([axis]))
            for start, end in ((0, place), (place, size))
        )
        y = onnx.Concat(last, first, axis=axis) if place else y
    return y


@operator(
    rule=lambda call: _reordered(call, call["dims"]),
    aten={"roll": _roll},
    spell=_spell_roll,
    samples=lambda: [
        sample(randn(2, 3, 4), shifts=(1,), dims=(1,)),
        sample(randn(2, 5, 5), shifts=(2, -1), dims=(1, 2)),
    ],
    symmetry=Symmetry.LAYOUT,
)
def roll(x: torch.Tensor, *, shifts: tuple[int, ...], dims: tuple[int, ...]) -> torch.Tensor:
    return torch.roll(x, shifts, dims)
