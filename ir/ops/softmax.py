"""Softmax and its logarithm: every entry is weighed against all others on one axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.graph import Node
from regauge.ir.operator import Adapter, OnnxForm, Speller, operator, sample
from regauge.ir.ops.conversion import as_dtype
from regauge.ir.ops.layout import axis_number, holds_no_sizes
from regauge.ir.scalars import Scalar
from regauge.ir.scales.scaling import Scaling
from regauge.ir.sizes.expressions import product, same


def _softmax_rule(call: Call) -> list[Axes]:
    axes = call.operand(0)
    if axes:
        call.role("normalise", axes[call.normal(call["dim"], len(axes))])
    return [axes]


def _aten_softmax(op: str) -> Adapter:
    def adapter(build: Any, x: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
        return build(op, as_dtype(build, x, dtype), dim=axis_number(dim, x.rank))

    return adapter


def _aten_inner(op: str) -> Adapter:
    """``_softmax(x, dim, half_to_float)``, the form that decompositions reach."""

    def adapter(build: Any, x: Any, dim: int, half_to_float: bool) -> Any:
        return build(op, as_dtype(build, x, torch.float32 if half_to_float else None), dim=axis_number(dim, x.rank))

    return adapter


def _onnx_softmax(op: str) -> OnnxForm:
    """Up to opset 12 the axes from ``axis`` on (1 by default) are one; from 13 on ``axis`` (-1) is the only one."""

    def reader(build: Any, call: Any) -> Any:
        x = call.operand(0)
        if call.opset >= 13:
            return build(op, x, dim=axis_number(call.attribute("axis", -1), x.rank))
        axis = call.attribute("axis", 1)
        axis = axis_number(axis, x.rank) if axis < x.rank else x.rank
        joined = [position for position in range(axis, x.rank) if not same(x.shape[position], 1)]
        if len(joined) == 1:
            return build(op, x, dim=joined[0])
        if axis == x.rank - 1:
            return build(op, x, dim=axis)
        flat = build.reshape(x, shape=(product(x.shape[:axis]), product(x.shape[axis:])))
        return build.reshape(build(op, flat, dim=1), shape=x.shape)

    return OnnxForm(read=reader, write=holds_no_sizes)


def _spell(op_type: str) -> Speller:
    def spell(onnx: Any, node: Node) -> Any:
        rank = node.outputs[0].rank
        axis = axis_number(node.attributes["dim"], rank)
        if onnx.opset < 13 and axis != rank - 1:
            raise onnx.refusal(f"{op_type} joins all axes from axis {axis} on before opset 13")
        return onnx(op_type, onnx.operand(0), axis=axis)

    return spell


def _softmax_element(x: Scalar, **_: Any) -> Scalar:
    weight = scalars.exp(x - scalars.shift(x))
    return weight / scalars.sum_(weight)


def _log_softmax_element(x: Scalar, **_: Any) -> Scalar:
    below = x - scalars.shift(x)
    return below - scalars.log(scalars.sum_(scalars.exp(below)))


@operator(
    rule=_softmax_rule,
    aten={
        "softmax": _aten_softmax("softmax"),
        "_softmax": _aten_inner("softmax"),
        "special_softmax": _aten_softmax("softmax"),
    },
    onnx={"Softmax": _onnx_softmax("softmax")},
    spell=_spell("Softmax"),
    samples=lambda: [sample(randn(2, 3, 4), dim=-1), sample(randn(2, 3), dim=0), sample(randn(4), dim=0)],
    layer=lambda node: f"nn.Softmax({node.attributes['dim']})",
    scaling=Scaling(within=(0, 1)),
    element=_softmax_element,
)
def softmax(x: Tensor, *, dim: int) -> Tensor:
    return torch.softmax(x, dim)


@operator(
    rule=_softmax_rule,
    aten={
        "log_softmax": _aten_softmax("log_softmax"),
        "_log_softmax": _aten_inner("log_softmax"),
        "special_log_softmax": _aten_softmax("log_softmax"),
    },
    onnx={"LogSoftmax": _onnx_softmax("log_softmax")},
    spell=_spell("LogSoftmax"),
    samples=lambda: [sample(randn(2, 3, 4), dim=1), sample(randn(2, 3), dim=-1)],
    layer=lambda node: f"nn.LogSoftmax({node.attributes['dim']})",
    element=_log_softmax_element,
)
def log_softmax(x: Tensor, *, dim: int) -> Tensor:
    return torch.log_softmax(x, dim)
