"""How new nodes of arithmetic operators are spelled in ONNX, where that takes more than one operator or a choice."""

from __future__ import annotations

import math
from typing import Any

import torch

from regauge.ir.graph import Node, Value


def truncated(onnx: Any, x: Any) -> Any:
    """``x`` rounded towards zero."""
    return onnx.Mul(onnx.Sign(x), onnx.Floor(onnx.Abs(x)))


def divide(onnx: Any, node: Node) -> Any:
    """Div cuts integers off towards zero; the floor of a quotient of integers is an exact division."""
    rounding, dtype = node.attributes["rounding_mode"], onnx.common_type
    x, y = onnx.operands(2, dtype)
    if rounding is None or (rounding == "trunc" and not dtype.is_floating_point):
        return onnx.Div(x, y)
    if rounding == "trunc":
        return truncated(onnx, onnx.Div(x, y))
    if dtype.is_floating_point:
        return onnx.Floor(onnx.Div(x, y))
    return onnx.Div(onnx.Sub(x, onnx.Mod(x, y)), y)


def power(onnx: Any, node: Node) -> Any:
    return onnx.Pow(*onnx.operands(2, onnx.common_type))


def remainder(onnx: Any, node: Node) -> Any:
    """Mod has the sign of the divisor for integers only."""
    dtype = onnx.common_type
    x, y = onnx.operands(2, dtype)
    if not dtype.is_floating_point:
        return onnx.Mod(x, y)
    return onnx.Sub(x, onnx.Mul(onnx.Floor(onnx.Div(x, y)), y))


def log_add_exp(onnx: Any, node: Node) -> Any:
    """The larger one, and what the smaller adds to it: softplus(-|x - y|)."""
    x, y = onnx.operands(2, onnx.common_type)
    return onnx.Add(onnx.Max(x, y), onnx.Softplus(onnx.Neg(onnx.Abs(onnx.Sub(x, y)))))


def expm1(onnx: Any, node: Node) -> Any:
    """exp(x) - 1; near zero, where that cancels, 2 t / (1 - t) with t = tanh(x / 2)."""
    x = onnx.operand(0, onnx.common_type)
    half = onnx.Tanh(onnx.Mul(x, 0.5))
    near = onnx.Div(onnx.Mul(half, 2.0), onnx.Sub(1.0, half))
    return onnx.Where(onnx.Less(onnx.Abs(x), 1.0), near, onnx.Sub(onnx.Exp(x), 1.0))


def log1p(onnx: Any, node: Node) -> Any:
    """log(1 + x); near zero what rounding loses in 1 + x is made good by a factor (Kahan)."""
    x = onnx.operand(0, onnx.common_type)
    above = onnx.Add(x, 1.0)
    logarithm, kept = onnx.Log(above), onnx.Sub(above, 1.0)
    near = onnx.Where(onnx.Greater(onnx.Abs(kept), 0.0), onnx.Mul(logarithm, onnx.Div(x, kept)), x)
    return onnx.Where(onnx.Less(onnx.Abs(x), 1.0), near, logarithm)


def logit(onnx: Any, node: Node) -> Any:
    x, eps = onnx.operand(0, onnx.common_type), node.attributes["eps"]
    x = x if eps is None else onnx.Max(onnx.Min(x, 1.0 - eps), eps)
    return onnx.Log(onnx.Div(x, onnx.Sub(1.0, x)))


def sinc(onnx: Any, node: Node) -> Any:
    """sin(pi x) / (pi x), and 1 so near to zero that it is that in all types."""
    angle = onnx.Mul(onnx.operand(0, onnx.common_type), math.pi)
    return onnx.Where(onnx.Less(onnx.Abs(angle), 5e-8), 1.0, onnx.Div(onnx.Sin(angle), angle))


def hypotenuse(onnx: Any, node: Node) -> Any:
    x, y = onnx.operands(2, onnx.common_type)
    return onnx.Sqrt(onnx.Add(onnx.Mul(x, x), onnx.Mul(y, y)))


def clamp(onnx: Any, node: Node) -> Any:
    """Clip takes bounds without axes, up to opset 10 numbers; others go through Max and Min, the upper bound last, as
    in torch; these broadcast from opset 8 on."""
    dtype = onnx.common_type
    numbers = {k: float(v) for k, v in zip(("min", "max"), node.inputs[1:], strict=False) if isinstance(v, int | float)}
    absent = sum(bound is None for bound in node.inputs[1:])
    if onnx.opset < 11 and len(numbers) + absent == len(node.inputs) - 1 and dtype.is_floating_point:
        return onnx.Clip(onnx.operand(0, dtype), **numbers)
    if onnx.opset < 8:
        raise onnx.refusal("its bounds are no numbers, and Max and Min broadcast from opset 8 on")
    x, low, high = onnx.operands(3, dtype)
    bounds = [bound for bound in node.inputs[1:] if isinstance(bound, Value) and bound.rank]
    if not bounds and onnx.opset >= 11 and (low is not None or high is not None):
        return onnx.Clip(x, low, high)
    x = x if low is None else onnx.Max(x, low)
    return x if high is None else onnx.Min(x, high)


def interpolation(onnx: Any, node: Node) -> Any:
    x, end, weight = onnx.operands(3, onnx.common_type)
    return onnx.Add(x, onnx.Mul(weight, onnx.Sub(end, x)))


def where(onnx: Any, node: Node) -> Any:
    dtype = node.outputs[0].dtype
    return onnx.Where(onnx.operand(0, torch.bool), onnx.operand(1, dtype), onnx.operand(2, dtype))


def is_finite(onnx: Any, node: Node) -> Any:
    x = onnx.operand(0)
    return onnx.Not(onnx.Or(onnx.IsNaN(x), onnx.IsInf(x)))


def bitwise(op_type: str, logical: str) -> Any:
    """Bits of booleans are booleans, for which ONNX has other operators."""

    def spell(onnx: Any, node: Node) -> Any:
        dtype = onnx.common_type
        return onnx(logical if dtype == torch.bool else op_type, *onnx.all_operands(dtype))

    return spell
