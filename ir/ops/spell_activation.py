"""How new nodes of activations are spelled in ONNX, where that takes more than one operator or a choice."""

from __future__ import annotations

import math
from typing import Any

from regauge.ir.graph import Node, Value

GELU_OPSET, MISH_OPSET, HARD_SWISH_OPSET = 20, 18, 14  # before these, a composition


def gelu(onnx: Any, node: Node) -> Any:
    x, approximate = onnx.operand(0), node.attributes["approximate"]
    if onnx.opset >= GELU_OPSET:
        return onnx.Gelu(x, approximate=approximate)
    if approximate == "tanh":
        cubic = onnx.Add(x, onnx.Mul(onnx.Mul(onnx.Mul(x, x), x), 0.044715))
        share = onnx.Tanh(onnx.Mul(cubic, math.sqrt(2 / math.pi)))
    else:
        share = onnx.Erf(onnx.Div(x, math.sqrt(2)))
    return onnx.Mul(onnx.Mul(x, onnx.Add(share, 1.0)), 0.5)


def silu(onnx: Any, node: Node) -> Any:
    x = onnx.operand(0)
    return onnx.Mul(x, onnx.Sigmoid(x))


def mish(onnx: Any, node: Node) -> Any:
    x = onnx.operand(0)
    return onnx.Mish(x) if onnx.opset >= MISH_OPSET else onnx.Mul(x, onnx.Tanh(onnx.Softplus(x)))


def hard_sigmoid(onnx: Any, node: Node) -> Any:
    return onnx.HardSigmoid(onnx.operand(0), alpha=1 / 6, beta=0.5)


def hard_swish(onnx: Any, node: Node) -> Any:
    x = onnx.operand(0)
    return onnx.HardSwish(x) if onnx.opset >= HARD_SWISH_OPSET else onnx.Mul(x, hard_sigmoid(onnx, node))


def hard_tanh(onnx: Any, node: Node) -> Any:
    low, high = node.attributes["min_val"], node.attributes["max_val"]
    x = onnx.operand(0)
    return onnx.Clip(x, low, high) if onnx.opset >= 11 else onnx.Clip(x, min=low, max=high)


def log_sigmoid(onnx: Any, node: Node) -> Any:
    return onnx.Neg(onnx.Softplus(onnx.Neg(onnx.operand(0))))


def softplus(onnx: Any, node: Node) -> Any:
    """``log(1 + exp(beta x)) / beta``, and x itself above the threshold, which matters where that is low."""
    x, beta, threshold = onnx.operand(0), node.attributes["beta"], node.attributes["threshold"]
    scaled = x if beta == 1 else onnx.Mul(x, float(beta))
    soft = onnx.Softplus(scaled)
    soft = soft if beta == 1 else onnx.Div(soft, float(beta))
    return soft if threshold >= 20 else onnx.Where(onnx.Greater(scaled, float(threshold)), x, soft)


def threshold(onnx: Any, node: Node) -> Any:
    x = onnx.operand(0)
    return onnx.Where(onnx.Greater(x, float(node.attributes["threshold"])), x, float(node.attributes["value"]))


def prelu(onnx: Any, node: Node) -> Any:
    """One slope per index of axis 1 gets an axis of size one for each axis behind it."""
    x, slope = node.inputs[0], onnx.operand(1)
    assert isinstance(x, Value)
    return onnx.PRelu(onnx.operand(0), onnx.unsqueeze(slope, *range(1, x.rank - 1)))


def glu(onnx: Any, node: Node) -> Any:
    x = node.inputs[0]
    assert isinstance(x, Value)
    axis = node.attributes["dim"] % x.rank
    halves = {"num_outputs": 2} if onnx.opset >= 18 else {}
    value, gate = onnx.Split(onnx.operand(0), outputs=2, axis=axis, **halves)
    return onnx.Mul(value, onnx.Sigmoid(gate))
