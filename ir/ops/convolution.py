"""Convolutions over any number of spatial axes, grouped, depthwise and transposed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Call
from regauge.ir.dims.extents import size_of
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import OnnxForm, Speller, Symmetry, operator, sample
from regauge.ir.ops.padding import pad_by
from regauge.ir.ops.slicing import slice_axis
from regauge.ir.ops.windows import per_axis, window_counts, window_places
from regauge.ir.scalars import Scalar
from regauge.ir.sizes.expressions import Size, floor_divide, is_static, product, same, simplify, symbols_in

Sizes = tuple[Size, ...]


Geometry: TypeAlias = tuple[tuple[Any, int], ...]
"""Attributes such as the stride, each with the number per axis at which the kernel stays in step."""


def _spatial_rule(call: Call, channels: str, unmoved: Sequence[tuple[str, int]]) -> str:
    """A rule with one name per spatial axis: s -> t where a window slides (pinned), s -> s where it does not."""
    weight = tuple(size_of(extent) for extent in call.operand(1))
    geometry = tuple((call[name], number) for name, number in unmoved)
    return _spatial_notation(channels, weight, geometry, call["groups"], call.rank(0) == len(weight))


def _slides(axis: int, weight: tuple[Size, ...], geometry: Geometry) -> bool:
    """Whether the kernel slides over a spatial axis; a kernel of one entry that stays in step with it does not."""
    still = all(per_axis(value, len(weight) - 2)[axis] == number for value, number in geometry)
    return not (still and same(weight[2 + axis], 1))


@cache
def _spatial_notation(channels: str, weight: tuple[Size, ...], geometry: Geometry, groups: int, batched: bool) -> str:
    """The notation for a weight of the given shape; factors of size one are left out, so that most axes are plain."""
    ones = "g" * (groups == 1) + channels[-1] * same(weight[1], 1) + channels[3] * same(weight[0], groups)

    def axis(*names: str) -> str:
        kept = [name for name in names if name not in ones]
        return f"({' '.join(kept)})" if len(kept) > 1 else kept[0] if kept else "1"

    places = range(len(weight) - 2)
    slides = [_slides(place, weight, geometry) for place in places]
    before, kernel = " ".join(f"s{i}" for i in places), " ".join(f"k{i}" for i in places)
    after = " ".join(f"t{i}" if slides[i] else f"s{i}" for i in places)
    windows = " ".join(f"s{i} k{i} t{i}" for i in places if slides[i])
    batch = "n " if batched else ""
    kernels = f"{axis('g', channels[3])} {axis(channels[-1])} {kernel}"
    rule = f"{batch}{axis('g', 'i')} {before}, {kernels}, {axis('g', 'o')}? -> {batch}{axis('g', 'o')} {after}"
    return rule + (f" ; window {windows}" if windows else "") + ("" if "g" in ones else " ; groups = g")


# -- convolution -------------------------------------------------------------------------------------------------------


def same_padding(size: Size, kernel: int, stride: int, dilation: int, *, upper: bool = True) -> tuple[Size, Size]:
    """Zeros before and after an axis for an output of ``ceil(size / stride)``; ``upper`` puts the odd one last."""
    reach = dilation * (kernel - 1)
    if stride == 1:
        amount: Size = reach
    elif isinstance(size, int):
        amount = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
    else:
        raise OperatorError(
            f"'same' padding of an axis of the dynamic size {size} with stride {stride} depends on the input"
        )
    small = floor_divide(amount, 2)
    large = simplify(amount - small)
    return (small, large) if upper else (large, small)


def padded_conv(
    build: Builder, x: Value, weight: Value, bias: Value | None, pads: Sequence[tuple[Size, Size]], **attributes: Any
) -> Any:
    """A convolution with padding per side: where the sides differ, the excess is a pad node before it."""
    if all(same(before, after) for before, after in pads):
        return build.conv(x, weight, bias, padding=tuple(before for before, _ in pads), **attributes)
    leading = x.rank - len(pads)
    x = pad_by(build, x, [(0, 0)] * leading + list(pads))
    return build.conv(x, weight, bias, padding=(0,) * len(pads), **attributes)


def _conv(
    build: Builder, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    rank = weight.rank - 2
    stride, dilation = per_axis(stride, rank), per_axis(dilation, rank)
    if padding == "valid":
        padding = 0
    if padding == "same":
        sizes = x.shape[-rank:]
        pads = [same_padding(sizes[i], _static(weight.shape[2 + i]), 1, dilation[i]) for i in range(rank)]
    else:
        pads = [(amount, amount) for amount in per_axis(padding, rank)]
    return padded_conv(build, x, weight, bias, pads, stride=stride, dilation=dilation, groups=groups)


def _static(size: Size) -> int:
    if not isinstance(size, int):
        raise OperatorError(f"a convolution kernel of the dynamic size {size} has no rule")
    return size


def _convolution(
    build: Builder, x: Value, weight: Value, bias: Value | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, *_flags: bool,
) -> Any:  # fmt: skip
    if transposed:
        return _conv_transpose(build, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv(build, x, weight, bias, stride, padding, dilation, groups)


def _conv_tbc(build: Builder, x: Value, weight: Value, bias: Value, pad: int = 0) -> Any:
    """``t b i, k i o, o -> t b o``"""
    moved, kernel = build.permute(x, dims=(1, 2, 0)), build.permute(weight, dims=(2, 1, 0))
    return build.permute(_conv(build, moved, kernel, bias, 1, pad), dims=(2, 0, 1))


def _onnx_geometry(call: Any) -> tuple[Value, Value, Value | None, dict[str, Any]]:
    x, weight = call.operand(0), call.operand(1)
    call.check_restated("kernel_shape", weight.shape[2:])
    rank = weight.rank - 2
    geometry = {
        "stride": tuple(call.attribute("strides") or (1,) * rank),
        "dilation": tuple(call.attribute("dilations") or (1,) * rank),
        "groups": call.attribute("group", 1),
    }
    return x, weight, call.operand(2) if call.has(2) else None, geometry


def _onnx_pairs(call: Any, rank: int) -> list[tuple[int, int]]:
    pads = call.attribute("pads") or (0,) * (2 * rank)
    return [(pads[i], pads[i + rank]) for i in range(rank)]


def _onnx_conv(build: Builder, call: Any) -> Any:
    x, weight, bias, geometry = _onnx_geometry(call)
    rank = weight.rank - 2
    automatic = call.attribute("auto_pad", "NOTSET")
    pads: Sequence[tuple[Size, Size]] = _onnx_pairs(call, rank)
    if automatic == "VALID":
        pads = [(0, 0)] * rank
    elif automatic in ("SAME_UPPER", "SAME_LOWER"):
        pads = [
            same_padding(x.shape[2 + i], _static(weight.shape[2 + i]), geometry["stride"][i], geometry["dilation"][i],
                         upper=automatic == "SAME_UPPER")
            for i in range(rank)
        ]  # fmt: skip
    return padded_conv(build, x, weight, bias, pads, **geometry)


def _write_sizes(nodes: Sequence[Node], patch: Any) -> None:
    """The number of groups follows a cut, the size of the kernel a weight that another one was merged into."""
    for node in nodes:
        if node.op in ("conv", "conv_transpose"):
            weight = node.inputs[1]
            assert isinstance(weight, Value)
            if node.attributes["groups"] != 1 or patch.has_attribute("group"):
                patch.attribute("group", node.attributes["groups"])
            if patch.has_attribute("kernel_shape"):
                patch.attribute("kernel_shape", weight.shape[2:])


def _spell(op_type: str, *extra: str) -> Speller:
    """One ONNX node; an operand without a batch axis gets one of size one, which is taken out again."""

    def spell(onnx: Any, node: Node) -> Any:
        x, weight = node.inputs[0], node.inputs[1]
        assert isinstance(x, Value) and isinstance(weight, Value)
        rank, batched = weight.rank - 2, x.rank == weight.rank
        operand, kernel, bias = onnx.operands(3)
        padding = per_axis(node.attributes["padding"], rank)
        y = onnx(
            op_type,
            operand if batched else onnx.unsqueeze(operand, 0),
            kernel,
            bias,
            kernel_shape=weight.shape[2:],
            strides=per_axis(node.attributes["stride"], rank),
            pads=(*padding, *padding),
            dilations=per_axis(node.attributes["dilation"], rank),
            group=node.attributes["groups"],
            **{name: per_axis(node.attributes[name], rank) for name in extra},
        )
        return y if batched else onnx.squeeze(y, 0)

    return spell


def _module(kind: str, node: Node, inputs: Size, outputs: Size, defaults: Sequence[tuple[str, int]]) -> str | None:
    weight = node.inputs[1]
    if not isinstance(weight, Value) or not 3 <= weight.rank <= 5:
        return None
    rank = weight.rank - 2
    given = [str(inputs), str(outputs), f"kernel_size={weight.shape[2:]}"]
    for name, usual in defaults:
        value = per_axis(node.attributes[name], rank)
        if value != (usual,) * rank:
            given.append(f"{name}={value}")
    if node.attributes["groups"] != 1:
        given.append(f"groups={node.attributes['groups']}")
    if len(node.inputs) < 3:
        given.append("bias=False")
    return f"nn.{kind}{rank}d({', '.join(given)})"


def _conv_layer(node: Node) -> str | None:
    weight = node.inputs[1]
    if not isinstance(weight, Value):
        return None
    inputs = product((weight.shape[1], node.attributes["groups"]))
    return _module("Conv", node, inputs, weight.shape[0], (("stride", 1), ("padding", 0), ("dilation", 1)))


def _conv_shape(
    x: Value, weight: Value, bias: Value | None = None, *, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[Size, ...] | None:
    """The shape where the sizes of the weight are numbers and the kernel fits."""
    if x.rank != weight.rank or not 3 <= x.rank <= 5 or symbols_in([x.shape[1], weight.shape]):
        return None
    channels = weight.shape[0]
    if x.shape[1] != weight.shape[1] * groups or channels % groups or (bias is not None and bias.shape != (channels,)):
        return None
    found = window_counts(x.shape[2:], weight.shape[2:], stride=stride, padding=padding, dilation=dilation)
    return None if found is None else (x.shape[0], channels, *found)


def _conv_element(
    x: Scalar, weight: Scalar, bias: Scalar | None = None, *, stride: Any, padding: Any, dilation: Any, groups: int
) -> Scalar | None:
    """Of a convolution whose options are given for each axis: a product over windows, zeros around the operand."""
    given = [option for option in (stride, padding, dilation) if isinstance(option, tuple)]
    count = max(map(len, given), default=0)
    pads = per_axis(padding, count)
    if not count or not all(map(is_static, pads)):
        return None
    inner = [scalars.Along(axis - count, slot=1) for axis in range(count)]
    places = window_places(inner, stride=stride, padding=pads, dilation=dilation)
    x = scalars.moved(x, places, 0.0 if any(pads) else None)
    return scalars.affine(scalars.sum_(x * weight), None, bias)


@operator(
    rule=lambda call: _spatial_rule(call, "(g o) i", (("stride", 1), ("padding", 0))),
    shape=_conv_shape,
    aten={
        "conv1d": _conv, "conv2d": _conv, "conv3d": _conv, "convolution": _convolution, "_convolution": _convolution,
        "conv_tbc": _conv_tbc,
    },
    onnx={"Conv": OnnxForm(read=_onnx_conv, write=_write_sizes, stores_shape=True)},
    macs=lambda call: call.out() * product(call.size(1, axis) for axis in range(1, call.rank(1))),
    symmetry=Symmetry.PRODUCT,
    samples=lambda: [
        sample(randn(2, 6, 5, 5), randn(8, 3, 3, 3), randn(8), padding=(1, 1), groups=2),
        sample(randn(2, 4, 7), randn(4, 1, 3), None, stride=(2,), groups=4),
        sample(randn(2, 3, 7), randn(6, 1, 3), randn(6), padding=(2,), dilation=(2,), groups=3),
        sample(randn(2, 3, 4, 5), randn(6, 3, 1, 1), randn(6)),
        sample(randn(2, 3, 4, 5), randn(6, 3, 1, 3), stride=(1, 2), padding=(0, 1)),
        sample(randn(3, 6, 5), randn(4, 3, 2, 2)),
        sample(randn(1, 4, 3, 4, 4), randn(2, 4, 2, 2, 2), randn(2)),
    ],
    layer=_conv_layer,
    spell=_spell("Conv"),
    element=_conv_element,
)  # fmt: skip
def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    return (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](x, weight, bias, stride, padding, dilation, groups)


# -- transposed convolution --------------------------------------------------------------------------------------------


def _conv_transpose(
    build: Builder, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    rank = weight.rank - 2
    return build.conv_transpose(
        x, weight, bias, stride=per_axis(stride, rank), padding=per_axis(padding, rank),
        output_padding=per_axis(output_padding, rank), groups=groups, dilation=per_axis(dilation, rank),
    )  # fmt: skip


def _transposed_pads(
    call: Any, x: Value, weight: Value, geometry: dict[str, Any], extra: Sequence[int]
) -> list[tuple[int, int]]:
    """What is cut off each side of the full result, from ``pads``, ``output_shape`` or ``auto_pad``."""
    rank = weight.rank - 2
    wanted, automatic = call.attribute("output_shape"), call.attribute("auto_pad", "NOTSET")
    if not wanted and automatic not in ("SAME_UPPER", "SAME_LOWER"):
        return [(0, 0)] * rank if automatic == "VALID" else _onnx_pairs(call, rank)
    pairs = []
    for i in range(rank):
        stride, dilation, size = geometry["stride"][i], geometry["dilation"][i], x.shape[2 + i]
        full = stride * (size - 1) + extra[i] + dilation * (_static(weight.shape[2 + i]) - 1) + 1
        target = wanted[len(wanted) - rank + i] if wanted else size * stride
        amount = simplify(full - target)
        if not isinstance(amount, int) or amount < 0:
            raise OperatorError(f"ConvTranspose to the size {target} has no rule: its full result has the size {full}")
        small = amount // 2
        pairs.append((small, amount - small) if automatic == "SAME_UPPER" else (amount - small, small))
    return pairs


def _onnx_conv_transpose(build: Builder, call: Any) -> Any:
    x, weight, bias, geometry = _onnx_geometry(call)
    rank = weight.rank - 2
    extra = tuple(call.attribute("output_padding") or (0,) * rank)
    pairs = _transposed_pads(call, x, weight, geometry, extra)
    padding = tuple(min(pair) for pair in pairs)
    result = build.conv_transpose(x, weight, bias, padding=padding, output_padding=extra, **geometry)
    for i, (before, after) in enumerate(pairs):
        end = simplify(result.shape[2 + i] - (after - padding[i]))
        result = slice_axis(build, result, 2 + i, before - padding[i], end)
    return result


def _conv_transpose_shape(
    x: Value, weight: Value, bias: Value | None = None, *, groups: int, **options: Any
) -> tuple[Size, ...] | None:
    """The shape where the sizes of the weight are numbers: each entry starts a window of its own."""
    rank, channels = weight.rank - 2, weight.shape[1] * groups
    if x.rank != weight.rank or not 1 <= rank <= 3 or symbols_in([x.shape[1], weight.shape]) or x.shape[1] % groups:
        return None
    if x.shape[1] != weight.shape[0] or (bias is not None and bias.shape != (channels,)):
        return None
    given = (per_axis(options[name], rank) for name in ("stride", "padding", "output_padding", "dilation"))
    found = []
    for size, kernel, step, pad, extra, spread in zip(x.shape[2:], weight.shape[2:], *given, strict=True):
        if min(step, spread) < 1 or not 0 <= extra < max(step, spread) or pad < 0:
            return None
        found.append((size - 1) * step - 2 * pad + spread * (kernel - 1) + extra + 1)
    return (x.shape[0], channels, *found) if all(size > 0 for size in found if isinstance(size, int)) else None


def _conv_transpose_layer(node: Node) -> str | None:
    weight = node.inputs[1]
    if not isinstance(weight, Value):
        return None
    outputs = product((weight.shape[1], node.attributes["groups"]))
    defaults = (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
    return _module("ConvTranspose", node, weight.shape[0], outputs, defaults)


@operator(
    rule=lambda call: _spatial_rule(call, "(g i) o", (("stride", 1), ("padding", 0), ("output_padding", 0))),
    shape=_conv_transpose_shape,
    aten={
        "conv_transpose1d": _conv_transpose,
        "conv_transpose2d": _conv_transpose,
        "conv_transpose3d": _conv_transpose,
    },
    onnx={"ConvTranspose": OnnxForm(read=_onnx_conv_transpose, write=_write_sizes, stores_shape=True)},
    macs=lambda call: call.count(0) * product(call.size(1, axis) for axis in range(1, call.rank(1))),
    symmetry=Symmetry.PRODUCT,
    samples=lambda: [
        sample(randn(2, 4, 3, 3), randn(4, 5, 2, 2), randn(5), stride=(2, 2)),
        sample(randn(2, 6, 4), randn(6, 2, 3), randn(4), stride=(2,), padding=(1,), output_padding=(1,), groups=2),
        sample(randn(2, 4, 5), randn(4, 1, 3), None, groups=4, dilation=(2,)),
        sample(randn(2, 4, 5), randn(4, 3, 1)),
        sample(randn(4, 3, 3), randn(4, 5, 2, 2)),
        sample(randn(1, 2, 2, 3, 2), randn(2, 3, 2, 2, 2), randn(3)),
    ],
    layer=_conv_transpose_layer,
    spell=_spell("ConvTranspose", "output_padding"),
)
def conv_transpose(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> torch.Tensor:
    transposes = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    return transposes[weight.dim() - 3](x, weight, bias, stride, padding, output_padding, groups, dilation)
