"""How the pools of ONNX are read: padding that torch cannot express becomes a node of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from regauge.ir.errors import OperatorError
from regauge.ir.graph import Value

Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Window:
    """The window of an ONNX pool: one number per spatial axis, padding as (before, after) pairs."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: Pads
    ceil_mode: bool

    @property
    def padding(self) -> tuple[int, ...] | None:
        """The padding as torch takes it, equal on both sides and at most half of the window; else None."""
        fits = all(a == b and 2 * a <= k for (a, b), k in zip(self.pads, self.kernel, strict=True))
        return tuple(before for before, _ in self.pads) if fits else None


def read_window(call: Any) -> Window:
    """Raises OperatorError for windows that torch cannot slide."""
    kernel = tuple(call.attribute("kernel_shape"))
    count = len(kernel)
    if not 1 <= count <= 3:
        raise OperatorError(f"{call.op_type} over {count} axes has no counterpart in torch: the node is kept as it is")
    stride = tuple(call.attribute("strides") or (1,) * count)
    dilation = tuple(call.attribute("dilations") or (1,) * count)
    pads = _pads(call, kernel, stride, dilation)
    return Window(kernel, stride, dilation, pads, bool(call.attribute("ceil_mode", 0)))


def _pads(call: Any, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Pads:
    count, mode = len(kernel), call.attribute("auto_pad", "NOTSET")
    if mode == "NOTSET":
        flat = call.attribute("pads") or (0,) * (2 * count)
        return tuple(zip(flat[:count], flat[count:], strict=True))
    if mode == "VALID":
        return ((0, 0),) * count
    return tuple(
        _same_padding(size, (k - 1) * d + 1, s, lower=mode == "SAME_LOWER")
        for size, k, s, d in zip(call.operand(0).shape[-count:], kernel, stride, dilation, strict=True)
    )


def _same_padding(size: Any, reach: int, stride: int, *, lower: bool) -> tuple[int, int]:
    """What SAME adds so that there are ceil(size / stride) windows; the odd one goes to the end, or the start."""
    if stride == 1:
        total = reach - 1
    elif isinstance(size, int):
        total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
    else:
        raise OperatorError("SAME padding with a stride over a dynamic size is computed when it runs: kept as it is")
    less, more = total // 2, total - total // 2
    return (more, less) if lower else (less, more)


def _padded(build: Any, x: Value, window: Window, value: float) -> Value:
    if window.ceil_mode:
        raise OperatorError("ceil_mode with padding on one side has no counterpart in torch: the node is kept as it is")
    if not any(any(pair) for pair in window.pads):
        return x
    pads = ((0, 0),) * (x.rank - len(window.pads)) + window.pads
    return build.pad(x, pads=pads, mode="constant", value=value)  # type: ignore[no-any-return]


def read_max_pool(build: Any, call: Any) -> Any:
    """Indices of ONNX count through the whole tensor, those of torch through one plane."""
    if call.wanted(1) or call.attribute("storage_order", 0):
        raise OperatorError("the indices of MaxPool count unlike torch's: the node is kept as it is")
    x, window = call.operand(0), read_window(call)
    padding = window.padding
    if padding is None:
        if not x.dtype.is_floating_point:
            raise OperatorError("integers cannot be padded with minus infinity: the node is kept as it is")
        x, padding = _padded(build, x, window, float("-inf")), (0,) * len(window.kernel)
    y = build.max_pool(
        x,
        kernel_size=window.kernel,
        stride=window.stride,
        padding=padding,
        dilation=window.dilation,
        ceil_mode=window.ceil_mode,
    )
    return (y, None) if call.outputs > 1 else y


def read_average_pool(build: Any, call: Any) -> Any:
    x, window = call.operand(0), read_window(call)
    if any(d != 1 for d in window.dilation):
        raise OperatorError("torch has no dilated average pool: the node is kept as it is")
    include = bool(call.attribute("count_include_pad", 0))
    options = {"kernel_size": window.kernel, "stride": window.stride}
    if window.padding is not None:
        counted = include or not any(window.padding)
        return build.avg_pool(
            x, **options, padding=window.padding, ceil_mode=window.ceil_mode, count_include_pad=counted
        )
    y = build.avg_pool(_padded(build, x, window, 0.0), **options, padding=(0,) * len(window.kernel))
    return y if include else build.div(y, build.constant(_real_share(x, window)))


def _real_share(x: Value, window: Window) -> torch.Tensor:
    """How much of each window lies inside the tensor, to undo the padding's part in the mean."""
    count = len(window.kernel)
    sizes = x.shape[-count:]
    if not all(isinstance(size, int) for size in sizes):
        raise OperatorError("uncounted padding on one side of a dynamic size: the node is kept as it is")
    ones = torch.ones((1, 1, *sizes), dtype=x.dtype if isinstance(x.dtype, torch.dtype) else None)
    flat = [amount for pair in reversed(window.pads) for amount in pair]
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[count - 1]
    return pool(F.pad(ones, flat), window.kernel, window.stride)


def read_lp_pool(build: Any, call: Any) -> Any:
    x, window = call.operand(0), read_window(call)
    if any(d != 1 for d in window.dilation):
        raise OperatorError("torch has no dilated p-norm pool: the node is kept as it is")
    if any(any(pair) for pair in window.pads):
        x = _padded(build, x, window, 0.0)
    return build.lp_pool(
        x,
        norm_type=call.attribute("p", 2),
        kernel_size=window.kernel,
        stride=window.stride,
        ceil_mode=window.ceil_mode,
    )


def read_global_average_pool(build: Any, call: Any) -> Any:
    x = call.operand(0)
    if 3 <= x.rank <= 5:
        return build.adaptive_avg_pool(x, output_size=(1,) * (x.rank - 2))
    return build.mean(x, dims=tuple(range(2, x.rank)), keepdim=True)


def read_global_max_pool(build: Any, call: Any) -> Any:
    x = call.operand(0)
    if 3 <= x.rank <= 5:
        return build.adaptive_max_pool(x, output_size=(1,) * (x.rank - 2))
    return build.amax(x, dims=tuple(range(2, x.rank)), keepdim=True)
