"""How new nodes of reductions and pools are spelled in ONNX."""

from __future__ import annotations

import math
from typing import Any

import torch

from regauge.ir.graph import Node, Value
from regauge.ir.operator import Speller
from regauge.ir.ops.windows import per_axis
from regauge.ir.sizes.expressions import product

AXES_AS_INPUT = 18  # of all reductions but ReduceSum, which was earlier


def _tensor(node: Node) -> Value:
    x = node.inputs[0]
    assert isinstance(x, Value)
    return x


def _axes(node: Node) -> tuple[int, ...] | None:
    """Axes counted from the front; None for all of them."""
    dims, rank = node.attributes["dims"], _tensor(node).rank
    return None if not dims or not rank else tuple(dim % rank for dim in dims)


def reduced(op_type: str, since: int = AXES_AS_INPUT) -> Speller:
    def spell(onnx: Any, node: Node) -> Any:
        x = onnx.operand(0, node.outputs[0].dtype)  # torch adds small integers up in 64 bits
        return onnx.on_axes(op_type, x, _axes(node), since=since, keepdims=node.attributes["keepdim"])

    return spell


def of_booleans(op_type: str) -> Speller:
    """The largest or smallest of zeros and ones."""

    def spell(onnx: Any, node: Node) -> Any:
        x = onnx.operand(0, torch.bool)
        numbers = onnx.cast(x, torch.int32)
        found = onnx.on_axes(op_type, numbers, _axes(node), since=AXES_AS_INPUT, keepdims=node.attributes["keepdim"])
        return onnx.cast(found, torch.bool)

    return spell


def variance(onnx: Any, node: Node) -> Any:
    """The mean square of what is left without the mean, times n / (n - correction)."""
    x, axes, value = onnx.operand(0), _axes(node), _tensor(node)
    correction = node.attributes["correction"]
    count = product(value.shape if axes is None else (value.shape[axis] for axis in axes))
    if correction and not isinstance(count, int):
        raise onnx.refusal(f"the correction of its variance depends on the dynamic size {count}")
    centred = onnx.Sub(x, onnx.on_axes("ReduceMean", x, axes, since=AXES_AS_INPUT, keepdims=1))
    squares = onnx.Mul(centred, centred)
    keepdims = node.attributes["keepdim"]
    spread = onnx.on_axes("ReduceMean", squares, axes, since=AXES_AS_INPUT, keepdims=keepdims)
    if not correction:
        return spread
    freedom = int(count) - correction  # torch divides by nothing less than zero: one number has no spread
    return onnx.Mul(spread, int(count) / freedom if freedom > 0 else math.inf)


def vector_norm(onnx: Any, node: Node) -> Any:
    order = node.attributes["ord"]
    x, names = onnx.operand(0), {1: "ReduceL1", 2: "ReduceL2", math.inf: "ReduceMax", -math.inf: "ReduceMin"}
    if order not in names:
        raise onnx.refusal(f"it has no norm of the order {order}")
    x = onnx.Abs(x) if math.isinf(order) else x
    return onnx.on_axes(names[order], x, _axes(node), since=AXES_AS_INPUT, keepdims=node.attributes["keepdim"])


# -- pools -------------------------------------------------------------------------------------------------------------


def _pooled(onnx: Any, node: Node, op_type: str, **options: Any) -> Any:
    """A pool over the last axes, all axes before them made one batch axis and one of channels."""
    count = len(node.attributes["kernel_size"])
    leading = _tensor(node).rank - count
    if leading not in (1, 2):
        raise onnx.refusal(f"a pool with {leading} axes before its window")
    x = onnx.operand(0) if leading == 2 else onnx.unsqueeze(onnx.operand(0), 0)
    padding = per_axis(node.attributes.get("padding", 0), count)
    if node.attributes["ceil_mode"]:
        options["ceil_mode"] = 1
    y = onnx(
        op_type,
        x,
        kernel_shape=node.attributes["kernel_size"],
        strides=node.attributes["stride"],
        pads=(*padding, *padding),
        **options,
    )
    return y if leading == 2 else onnx.squeeze(y, 0)


def max_pool(onnx: Any, node: Node) -> Any:
    if len(node.outputs) > 1:
        raise onnx.refusal("the indices of MaxPool count unlike torch's")
    dilation = per_axis(node.attributes["dilation"], len(node.attributes["kernel_size"]))
    return _pooled(onnx, node, "MaxPool", **({"dilations": dilation} if set(dilation) != {1} else {}))


def average_pool(onnx: Any, node: Node) -> Any:
    """Another divisor than the number of entries is a factor of its own; then padding must count everywhere."""
    divisor, kernel = node.attributes["divisor_override"], math.prod(node.attributes["kernel_size"])
    padded = any(per_axis(node.attributes["padding"], 1))
    if node.attributes["ceil_mode"] and (divisor or padded):
        raise onnx.refusal("AveragePool counts the entries of partial windows unlike torch")
    counted = bool(divisor) or node.attributes["count_include_pad"]
    y = _pooled(onnx, node, "AveragePool", count_include_pad=1 if counted and padded else None)
    return onnx.Mul(y, kernel / divisor) if divisor else y


def lp_pool(onnx: Any, node: Node) -> Any:
    order = node.attributes["norm_type"]
    if int(order) != order or node.attributes["ceil_mode"]:
        raise onnx.refusal(f"LpPool with the order {order} or partial windows")
    return _pooled(onnx, node, "LpPool", p=int(order))


def adaptive_pool(global_type: str, op_type: str, reduce_type: str) -> Speller:
    """A global pool where every axis becomes one entry, a plain pool where windows tile the axes."""

    def spell(onnx: Any, node: Node) -> Any:
        if len(node.outputs) > 1:
            raise onnx.refusal("the indices of MaxPool count unlike torch's")
        value, sizes = _tensor(node), tuple(node.attributes["output_size"])
        first = value.rank - len(sizes)
        spatial = value.shape[first:]
        if set(sizes) == {1} and first == 2:
            return onnx(global_type, onnx.operand(0))
        if set(sizes) == {1}:
            axes = tuple(range(first, value.rank))
            return onnx.on_axes(reduce_type, onnx.operand(0), axes, since=AXES_AS_INPUT, keepdims=1)
        if first not in (1, 2) or not all(
            isinstance(s, int) and s % o == 0 for s, o in zip(spatial, sizes, strict=True)
        ):
            raise onnx.refusal(f"its windows from {spatial} to {sizes} have different sizes")
        window = [int(size) // wanted for size, wanted in zip(spatial, sizes, strict=True)]
        x = onnx.operand(0) if first == 2 else onnx.unsqueeze(onnx.operand(0), 0)
        y = onnx(op_type, x, kernel_shape=window, strides=window)
        return y if first == 2 else onnx.squeeze(y, 0)

    return spell
