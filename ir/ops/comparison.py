"""Comparisons, logic on booleans and bits, and the choice between two values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, randint, randn

from regauge.ir import scalars
from regauge.ir.graph import Node, Value
from regauge.ir.operator import OnnxForm, Sample, Symmetry, sample
from regauge.ir.ops import spell_arithmetic as spelling
from regauge.ir.ops.elementwise import aten_binary, onnx_binary, onnx_pair, pointwise
from regauge.ir.scales.scaling import Scaling


def _numbers(*shape: int) -> Tensor:
    return randint(-2, 3, shape)  # few different values, so that equal ones occur


def _booleans(*shape: int) -> Tensor:
    return randn(*shape) > 0


def _compared() -> list[Sample]:
    return [
        sample(randn(2, 3, 4), randn(3, 1)),
        sample(_numbers(2, 1, 4), _numbers(3, 1)),
        sample(_numbers(2, 3), 1),
        sample(0.3, randn(3)),
    ]


def _combined() -> list[Sample]:
    return [sample(_booleans(2, 3, 4), _booleans(3, 1)), sample(_booleans(2, 1), _booleans(3))]


def _bits() -> list[Sample]:
    return [*_combined(), sample(_numbers(2, 3), _numbers(3)), sample(_numbers(2, 3), 5)]


# -- comparisons -------------------------------------------------------------------------------------------------------


@pointwise(
    aten={"eq": aten_binary("eq")},
    onnx={"Equal": onnx_binary("eq")},
    samples=_compared,
    commutative=True,
    scaling=Scaling(powers={"x y": 0}),
    element=scalars.eq,
)
def eq(x: Tensor, y: Tensor) -> Tensor:
    return x == y


@pointwise(
    aten=dict.fromkeys(("ne", "not_equal"), aten_binary("ne")),
    samples=_compared,
    spell=lambda onnx, node: onnx.Not(onnx.Equal(*onnx.operands(2, onnx.common_type))),
    commutative=True,
    scaling=Scaling(powers={"x y": 0}),
    element=scalars.ne,
)
def ne(x: Tensor, y: Tensor) -> Tensor:
    return x != y


@pointwise(
    aten=dict.fromkeys(("lt", "less"), aten_binary("lt")),
    onnx={"Less": onnx_binary("lt")},
    samples=_compared,
    scaling=Scaling(powers={"x y": 0}),
    element=lambda x, y: x < y,
)
def lt(x: Tensor, y: Tensor) -> Tensor:
    return x < y


@pointwise(
    aten=dict.fromkeys(("le", "less_equal"), aten_binary("le")),
    onnx={"LessOrEqual": onnx_binary("le")},
    samples=_compared,
    scaling=Scaling(powers={"x y": 0}),
    element=lambda x, y: x <= y,
)
def le(x: Tensor, y: Tensor) -> Tensor:
    return x <= y


@pointwise(
    aten=dict.fromkeys(("gt", "greater"), aten_binary("gt")),
    onnx={"Greater": onnx_binary("gt")},
    samples=_compared,
    scaling=Scaling(powers={"x y": 0}),
    element=lambda x, y: x > y,
)
def gt(x: Tensor, y: Tensor) -> Tensor:
    return x > y


@pointwise(
    aten=dict.fromkeys(("ge", "greater_equal"), aten_binary("ge")),
    onnx={"GreaterOrEqual": onnx_binary("ge")},
    samples=_compared,
    scaling=Scaling(powers={"x y": 0}),
    element=lambda x, y: x >= y,
)
def ge(x: Tensor, y: Tensor) -> Tensor:
    return x >= y


@pointwise(
    aten=["isnan"], onnx=["IsNaN"], samples=lambda: [sample(randn(2, 3).log())], scaling=Scaling(powers={"x": 0})
)
def isnan(x: Tensor) -> Tensor:
    return torch.isnan(x)


@pointwise(
    aten=["isfinite"],
    samples=lambda: [sample(1 / _numbers(2, 3))],
    spell=spelling.is_finite,
    scaling=Scaling(powers={"x": 0}),
)
def isfinite(x: Tensor) -> Tensor:
    return torch.isfinite(x)


def _onnx_infinite(build: Any, call: Any) -> Any:
    """IsInf may be told to look for one sign only."""
    x = call.operand(0)
    below, above = call.attribute("detect_negative", 1), call.attribute("detect_positive", 1)
    if below and above:
        return build.isinf(x)
    return build.eq(x, float("-inf") if below else float("inf"))


@pointwise(
    aten=["isinf"],
    onnx={"IsInf": OnnxForm(read=_onnx_infinite, direct=True)},
    samples=lambda: [sample(1 / _numbers(2, 3))],
    scaling=Scaling(powers={"x": 0}),
)
def isinf(x: Tensor) -> Tensor:
    return torch.isinf(x)


# -- logic -------------------------------------------------------------------------------------------------------------


@pointwise(
    aten=["logical_and"],
    onnx={"And": onnx_binary("logical_and", numbers=False)},
    samples=_combined,
    commutative=True,
    element=scalars.logical_and,
)
def logical_and(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_and(x, y)


@pointwise(
    aten=["logical_or"],
    onnx={"Or": onnx_binary("logical_or", numbers=False)},
    samples=_combined,
    commutative=True,
    element=scalars.logical_or,
)
def logical_or(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_or(x, y)


@pointwise(
    aten=["logical_xor"],
    onnx={"Xor": onnx_binary("logical_xor", numbers=False)},
    samples=_combined,
    commutative=True,
)
def logical_xor(x: Tensor, y: Tensor) -> Tensor:
    return torch.logical_xor(x, y)


@pointwise(aten=["logical_not"], onnx=["Not"], samples=lambda: [sample(_booleans(2, 3))], element=scalars.logical_not)
def logical_not(x: Tensor) -> Tensor:
    return torch.logical_not(x)


@pointwise(
    aten=dict.fromkeys(("bitwise_and", "__and__"), aten_binary("bitwise_and")),
    onnx={"BitwiseAnd": onnx_binary("bitwise_and")},
    spell=spelling.bitwise("BitwiseAnd", "And"),
    samples=_bits,
    commutative=True,
)
def bitwise_and(x: Tensor, y: Tensor) -> Tensor:
    return x & y


@pointwise(
    aten=dict.fromkeys(("bitwise_or", "__or__"), aten_binary("bitwise_or")),
    onnx={"BitwiseOr": onnx_binary("bitwise_or")},
    spell=spelling.bitwise("BitwiseOr", "Or"),
    samples=_bits,
    commutative=True,
)
def bitwise_or(x: Tensor, y: Tensor) -> Tensor:
    return x | y


@pointwise(
    aten=dict.fromkeys(("bitwise_xor", "__xor__"), aten_binary("bitwise_xor")),
    onnx={"BitwiseXor": onnx_binary("bitwise_xor")},
    spell=spelling.bitwise("BitwiseXor", "Xor"),
    samples=_bits,
    commutative=True,
)
def bitwise_xor(x: Tensor, y: Tensor) -> Tensor:
    return x ^ y


@pointwise(
    aten=["bitwise_not"],
    onnx=["BitwiseNot"],
    spell=spelling.bitwise("BitwiseNot", "Not"),
    samples=lambda: [sample(_booleans(2, 3)), sample(_numbers(2, 3))],
)
def bitwise_not(x: Tensor) -> Tensor:
    return ~x


def _bit_shift(build: Any, call: Any) -> Any:
    left = call.attribute("direction") == "LEFT"
    return build("bitwise_left_shift" if left else "bitwise_right_shift", *onnx_pair(build, call))


def _shifted() -> list[Sample]:
    return [sample(randint(0, 99, (2, 3)), randint(0, 4, (3,))), sample(randint(0, 99, (2, 3)), 2)]


@pointwise(
    aten=dict.fromkeys(("bitwise_left_shift", "__lshift__"), aten_binary("bitwise_left_shift")),
    onnx={"BitShift": _bit_shift},
    samples=_shifted,
)
def bitwise_left_shift(x: Tensor, y: Tensor) -> Tensor:
    return x << y


@pointwise(
    aten=dict.fromkeys(("bitwise_right_shift", "__rshift__"), aten_binary("bitwise_right_shift")), samples=_shifted
)
def bitwise_right_shift(x: Tensor, y: Tensor) -> Tensor:
    return x >> y


# -- choice ------------------------------------------------------------------------------------------------------------


def _where(build: Any, condition: Any, x: Any, y: Any) -> Any:
    return build.where(condition, x, y)


def _masked_fill(build: Any, x: Any, mask: Any, value: Any) -> Any:
    """``masked_fill`` keeps the type of ``x``, so a number is first made one of that type."""
    if isinstance(value, Value):
        value = value if value.dtype == x.dtype else build.cast(value, dtype=x.dtype)
    elif x.dtype == torch.bool:
        value = bool(value)
    elif not (x.dtype.is_floating_point or x.dtype.is_complex):
        value = int(value)
    return build.where(mask, value, x)


def _threshold_backward(build: Any, gradient: Any, x: Any, threshold: float) -> Any:
    """The gradient of a ReLU in a captured backward pass."""
    return build.where(build.gt(x, threshold), gradient, 0.0)


def _choice_symmetry(node: Node) -> Symmetry:
    """A choice between two values of one shape, or a value and zero, is linear in them with every index for itself."""
    like = (node.output.shape, node.output.dtype)
    for choice in node.inputs[1:]:
        if (choice.shape, choice.dtype) != like if isinstance(choice, Value) else choice != 0:
            return Symmetry.POINTWISE
    return Symmetry.INDEXWISE


def _choices() -> list[Sample]:
    return [
        sample(_booleans(2, 3, 4), randn(3, 1), randn(4)),
        sample(_booleans(3, 1), randn(2, 1, 4), 0.0),
        sample(_booleans(2, 3), -1.0, randn(2, 3)),
        sample(_booleans(2, 3), 1.0, 0.0),
        sample(_booleans(2, 3), randn(2, 3), randn(2, 3)),
        sample(_booleans(3, 1), randn(2, 3, 4), 0.0),
    ]


@pointwise(
    aten={
        "threshold_backward": _threshold_backward,
        "where.self": _where,
        "where.Scalar": _where,
        "where.ScalarSelf": _where,
        "where.ScalarOther": _where,
        "masked_fill": _masked_fill,
    },
    onnx=["Where"],
    spell=spelling.where,
    samples=_choices,
    symmetry=_choice_symmetry,
    scaling=Scaling(powers={"x y": 1}),
    element=scalars.where,
)
def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)
