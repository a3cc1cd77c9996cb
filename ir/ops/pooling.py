"""Pooling: the largest, the mean or the p-norm of windows that slide over the last axes.

How many axes are spatial follows from the number of window sizes; all axes before them are mapped over. An axis pooled
into a single entry as a whole is a reduction, which may be cut; every other spatial axis is a window, which may not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.dims.extents import ONE
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Adapter, Symmetry, operator, sample
from regauge.ir.ops import spell_reduction as spelling
from regauge.ir.ops.onnx_pooling import (
    read_average_pool,
    read_global_average_pool,
    read_global_max_pool,
    read_lp_pool,
    read_max_pool,
)
from regauge.ir.ops.windows import per_axis, window_counts, window_places
from regauge.ir.scalars import Scalar
from regauge.ir.scales.scaling import Scaling
from regauge.ir.sizes.expressions import Size, same


def window_rule(call: Call, spatial: int) -> list[Axes]:
    """The last ``spatial`` axes are windows on both sides; every result has the same axes."""
    axes = call.operand(0)
    kept, slid = list(axes[: len(axes) - spatial]), axes[len(axes) - spatial :]
    made = [call.fresh(size) for size in call.node.outputs[0].shape[len(axes) - spatial :]]
    for extent in (*slid, *made):
        call.role("window", extent)
    return [kept + made for _ in call.node.outputs]


def _pool_rule(call: Call) -> list[Axes]:
    return window_rule(call, len(call["kernel_size"]))


def _adaptive_rule(call: Call) -> list[Axes]:
    """An axis pooled to size one is reduced as a whole, unless the position of its largest entry is asked for."""
    axes, sizes = list(call.operand(0)), call["output_size"]
    whole = len(call.node.outputs) == 1
    for position, size in zip(range(len(axes) - len(sizes), len(axes)), sizes, strict=True):
        alone = same(size, 1)
        call.role("reduce" if alone and whole else "window", axes[position])
        axes[position] = ONE if alone else call.fresh(size)
        call.role("window", axes[position])
    return [list(axes) for _ in call.node.outputs]


def _pool_shape(
    x: Value,
    *,
    kernel_size: Sequence[Any],
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    dilation: Any = 1,
    return_indices: bool = False,
    **_: Any,
) -> tuple[Size, ...] | None:
    """The shape where all sizes are numbers and only whole windows count."""
    spatial = len(kernel_size)
    pads = per_axis(padding, spatial)
    if (
        ceil_mode
        or return_indices
        or x.rank - spatial not in (1, 2)
        or any(2 * pad > size for pad, size in zip(pads, kernel_size, strict=True))
    ):
        return None
    kept, slid = x.shape[: x.rank - spatial], x.shape[x.rank - spatial :]
    found = window_counts(slid, kernel_size, stride=stride, padding=padding, dilation=dilation)
    return None if found is None else (*kept, *found)


def _adaptive_shape(x: Value, *, output_size: Sequence[Any], return_indices: bool = False) -> tuple[Size, ...] | None:
    kept = x.rank - len(output_size)
    numbers = all(isinstance(size, int) and size > 0 for size in output_size) and 0 not in x.shape[kept:]
    return (*x.shape[:kept], *output_size) if numbers and kept in (1, 2) and not return_indices else None


# -- layers ------------------------------------------------------------------------------------------------------------


def _short(sizes: Sequence[Any]) -> Any:
    """One number where all axes have the same."""
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)


def _layer(name: str, *options: str) -> Any:
    """The layer of a pool over 1 to 3 axes with a batch axis; ``options`` are attributes with non-default values."""

    def text(node: Node) -> str | None:
        count = len(node.attributes["kernel_size"])
        x = node.inputs[0]
        if not isinstance(x, Value) or x.rank != count + 2 or len(node.outputs) != 1:
            return None
        attributes = dict(node.attributes)
        given = [f"{_short(attributes['kernel_size'])}", f"stride={_short(attributes['stride'])}"]
        for option in options:
            value = _short(attributes[option]) if isinstance(attributes[option], tuple) else attributes[option]
            if value != node.operator.attributes[option]:
                given.append(f"{option}={value}")
        return f"nn.{name}{count}d({', '.join(given)})"

    return text


def _adaptive_layer(name: str) -> Any:
    def text(node: Node) -> str | None:
        sizes = node.attributes["output_size"]
        x = node.inputs[0]
        if not isinstance(x, Value) or x.rank != len(sizes) + 2 or len(node.outputs) != 1:
            return None
        return f"nn.{name}{len(sizes)}d({_short(sizes)})" if all(isinstance(size, int) for size in sizes) else None

    return text


# -- elements ----------------------------------------------------------------------------------------------------------


def _places(kernel_size: Sequence[Any], **options: Any) -> dict[int, scalars.Place] | None:
    """Where windows read, by axis; None where a size is no number."""
    if not all(isinstance(size, int) for size in kernel_size):
        return None
    inner = [scalars.Along(axis - len(kernel_size), window=size) for axis, size in enumerate(kernel_size)]
    return window_places(inner, **options)


def _max_pool_element(
    x: Scalar, *, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, **_: Any
) -> Scalar | None:
    places = _places(kernel_size, stride=stride, padding=padding, dilation=dilation)
    if places is None:
        return None
    return scalars.amax(scalars.moved(x, places, -math.inf if ceil_mode or _any(padding) else None))


def _any(padding: Any) -> bool:
    return any(amount != 0 for amount in per_axis(padding, 1))


def _avg_pool_element(
    x: Scalar, *, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool,
    divisor_override: int | None,
) -> Scalar | None:  # fmt: skip
    """Entries outside are zeros; they count where the padding does, but never where the last window only begins."""
    places = _places(kernel_size, stride=stride, padding=padding)
    padded = _any(padding)
    if places is None or (ceil_mode and padded and count_include_pad):
        return None
    together: Scalar = scalars.sum_(scalars.moved(x, places, 0.0 if ceil_mode or padded else None))
    if divisor_override is not None and len(kernel_size) > 1:  # torch's pools of one axis take none
        return together / divisor_override
    if ceil_mode or (padded and not count_include_pad):
        count: Scalar = scalars.sum_(scalars.where(scalars.inside(x, places), 1.0, 0.0))
        return together / count
    return together / int(math.prod(kernel_size))


def _whole(element: Callable[[Scalar], Scalar]) -> scalars.Element:
    """Of pools that give one number for all of each axis; others have windows of several sizes."""

    def stated(x: Scalar, *, output_size: Any, **_: Any) -> Scalar | None:
        return element(x) if all(same(size, 1) for size in output_size) else None

    return stated


# -- windows -----------------------------------------------------------------------------------------------------------


def _max_pool(count: int, *, with_indices: bool = False) -> Adapter:
    """The indices are a node of their own, so that a graph that never reads them has plain pools only."""

    def adapter(
        build: Any,
        x: Any,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Any:
        kernel = per_axis(kernel_size, count)
        options = {
            "kernel_size": kernel,
            "stride": per_axis(stride, count) if stride else kernel,
            "padding": per_axis(padding, count),
            "dilation": per_axis(dilation, count),
            "ceil_mode": ceil_mode,
        }
        values = build.max_pool(x, **options)
        return (values, build.max_pool(x, **options, return_indices=True)[1]) if with_indices else values

    return adapter


@operator(
    rule=_pool_rule,
    aten={f"max_pool{n}d": _max_pool(n) for n in (1, 2, 3)}
    | {f"max_pool{n}d_with_indices": _max_pool(n, with_indices=True) for n in (1, 2, 3)},
    shape=_pool_shape,
    onnx={"MaxPool": read_max_pool},
    spell=spelling.max_pool,
    samples=lambda: [
        sample(randn(2, 3, 8, 8), kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)),
        sample(randn(2, 3, 9), kernel_size=(2,), stride=(2,), ceil_mode=True),
        sample(randn(3, 8, 6), kernel_size=(2, 3), stride=(1, 2), dilation=(2, 1)),
        sample(randn(2, 2, 4, 4, 4), kernel_size=(2, 2, 2), stride=(2, 2, 2)),
        sample(randn(2, 3, 6, 6), kernel_size=(2, 2), stride=(2, 2), return_indices=True),
    ],
    symmetry=lambda node: Symmetry.HOMOGENEOUS if len(node.outputs) == 1 else Symmetry.POINTWISE,
    layer=_layer("MaxPool", "padding", "dilation", "ceil_mode"),
    scaling=Scaling(powers={"x": 1}),
    element=_max_pool_element,
)
def max_pool(
    x: Tensor,
    *,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    return (
        (F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices)[len(kernel_size) - 1](
            x, kernel_size, stride, padding, dilation, ceil_mode
        )
        if return_indices
        else (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel_size) - 1](
            x, kernel_size, stride, padding, dilation, ceil_mode
        )
    )


def _avg_pool(count: int) -> Adapter:
    def adapter(
        build: Any,
        x: Any,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        kernel = per_axis(kernel_size, count)
        return build.avg_pool(
            x,
            kernel_size=kernel,
            stride=per_axis(stride, count) if stride else kernel,
            padding=per_axis(padding, count),
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
            divisor_override=divisor_override,
        )

    return adapter


@operator(
    rule=_pool_rule,
    aten={f"avg_pool{n}d": _avg_pool(n) for n in (1, 2, 3)},
    shape=_pool_shape,
    onnx={"AveragePool": read_average_pool},
    spell=spelling.average_pool,
    samples=lambda: [
        sample(randn(2, 3, 8, 8), kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), count_include_pad=False),
        sample(randn(2, 3, 9), kernel_size=(2,), stride=(2,), ceil_mode=True),
        sample(randn(3, 8, 6), kernel_size=(2, 3), stride=(1, 2), divisor_override=5),
        sample(randn(2, 2, 4, 4, 4), kernel_size=(2, 2, 2), stride=(2, 2, 2)),
    ],
    symmetry=Symmetry.LINEAR,
    layer=_layer("AvgPool", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    element=_avg_pool_element,
)
def avg_pool(
    x: Tensor,
    *,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...] | int = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    return (
        F.avg_pool1d(x, kernel_size, stride, padding, ceil_mode, count_include_pad)
        if len(kernel_size) == 1  # which takes no other divisor
        else (F.avg_pool2d, F.avg_pool3d)[len(kernel_size) - 2](
            x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
    )


@operator(
    rule=_pool_rule,
    onnx={"LpPool": read_lp_pool},
    spell=spelling.lp_pool,
    samples=lambda: [
        sample(randn(2, 3, 8, 8), norm_type=2, kernel_size=(3, 3), stride=(2, 2)),
        sample(randn(2, 3, 9), norm_type=3, kernel_size=(2,), stride=(2,)),
    ],
    symmetry=Symmetry.HOMOGENEOUS,
)
def lp_pool(
    x: Tensor, *, norm_type: float, kernel_size: tuple[int, ...], stride: tuple[int, ...], ceil_mode: bool = False
) -> Tensor:
    powers = torch.abs(x) ** norm_type
    means = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel_size) - 1](powers, kernel_size, stride, 0, ceil_mode)
    return (means * math.prod(kernel_size)) ** (1 / norm_type)


# -- adaptive windows --------------------------------------------------------------------------------------------------


def _adaptive(op: str, count: int) -> Adapter:
    def adapter(build: Any, x: Any, output_size: Any) -> Any:
        return build(op, x, output_size=per_axis(output_size, count))

    return adapter


def _adaptive_max(count: int) -> Adapter:
    """Values and indices, each from a node of its own."""

    def adapter(build: Any, x: Any, output_size: Any) -> Any:
        sizes = per_axis(output_size, count)
        values = build.adaptive_max_pool(x, output_size=sizes)
        return values, build.adaptive_max_pool(x, output_size=sizes, return_indices=True)[1]

    return adapter


@operator(
    rule=_adaptive_rule,
    aten={f"adaptive_avg_pool{n}d": _adaptive("adaptive_avg_pool", n) for n in (1, 2, 3)}
    | {f"_adaptive_avg_pool{n}d": _adaptive("adaptive_avg_pool", n) for n in (2, 3)},
    shape=_adaptive_shape,
    onnx={"GlobalAveragePool": read_global_average_pool},
    spell=spelling.adaptive_pool("GlobalAveragePool", "AveragePool", "ReduceMean"),
    samples=lambda: [
        sample(randn(2, 3, 5, 4), output_size=(1, 1)),
        sample(randn(2, 3, 8, 8), output_size=(3, 1)),
        sample(randn(2, 3, 7), output_size=(3,)),
        sample(randn(3, 4, 4, 4), output_size=(2, 2, 2)),
    ],
    symmetry=Symmetry.LINEAR,
    layer=_adaptive_layer("AdaptiveAvgPool"),
    element=_whole(scalars.mean),
)
def adaptive_avg_pool(x: Tensor, *, output_size: Any) -> Tensor:
    return (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(output_size) - 1](x, output_size)


@operator(
    rule=_adaptive_rule,
    aten={f"adaptive_max_pool{n}d": _adaptive_max(n) for n in (1, 2, 3)},
    shape=_adaptive_shape,
    onnx={"GlobalMaxPool": read_global_max_pool},
    spell=spelling.adaptive_pool("GlobalMaxPool", "MaxPool", "ReduceMax"),
    samples=lambda: [
        sample(randn(2, 3, 5, 4), output_size=(1, 1)),
        sample(randn(2, 3, 7), output_size=(3,)),
        sample(randn(2, 3, 5, 4), output_size=(1, 2), return_indices=True),
    ],
    symmetry=lambda node: Symmetry.HOMOGENEOUS if len(node.outputs) == 1 else Symmetry.POINTWISE,
    layer=_adaptive_layer("AdaptiveMaxPool"),
    scaling=Scaling(powers={"x": 1}),
    element=_whole(scalars.amax),
)
def adaptive_max_pool(x: Tensor, *, output_size: Any, return_indices: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    return (
        (F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices, F.adaptive_max_pool3d_with_indices)[
            len(output_size) - 1
        ](x, output_size)
        if return_indices
        else (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[len(output_size) - 1](x, output_size)
    )
