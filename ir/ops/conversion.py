"""Operators that pass values on: casts, identities and dropout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, randn

from regauge.ir import scalars
from regauge.ir.dtypes import OVERFLOWING
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Adapter, Symmetry, sample
from regauge.ir.ops.elementwise import pointwise
from regauge.ir.scalars import Scalar

ONNX_DTYPES: Mapping[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 14: torch.complex64,
    15: torch.complex128, 16: torch.bfloat16, 17: torch.float8_e4m3fn, 18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2, 20: torch.float8_e5m2fnuz,
}  # fmt: skip
"""Element types of ONNX (TensorProto.DataType) that torch has too."""


def onnx_dtype(code: int) -> torch.dtype:
    """The torch type of an ONNX element type; raises OperatorError for types torch cannot compute with (strings)."""
    try:
        return ONNX_DTYPES[int(code)]
    except KeyError:
        raise OperatorError(
            f"ONNX element type {code} has no counterpart in torch: the node is kept as it is"
        ) from None


# -- casts -------------------------------------------------------------------------------------------------------------


def as_dtype(build: Any, x: Any, dtype: torch.dtype | None) -> Any:
    """``x`` with another element type; no node where it has that type already."""
    return x if dtype is None or x.dtype == dtype else build.cast(x, dtype=dtype)


def _to(build: Any, x: Any, *arguments: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
    """Every overload of ``to``: only the element type matters, devices and memory formats do not."""
    for argument in arguments:
        if isinstance(argument, torch.dtype):
            dtype = argument
        elif isinstance(argument, Value):
            dtype = argument.dtype  # type: ignore[assignment]
    return as_dtype(build, x, dtype)


def _to_fixed(dtype: torch.dtype) -> Adapter:
    def adapter(build: Any, x: Any) -> Any:
        return as_dtype(build, x, dtype)

    return adapter


def _type_as(build: Any, x: Any, other: Any) -> Any:
    return as_dtype(build, x, other.dtype)


def _copy(build: Any, x: Any, source: Any, non_blocking: bool = False) -> Any:
    """``x.copy_(source)`` made functional: the source with the element type and the shape of ``x``."""
    result = as_dtype(build, source, x.dtype)
    return result if result.shape == x.shape else build.expand(result, shape=x.shape)


def _onnx_cast(build: Any, call: Any) -> Any:
    return _cast_as_onnx_does(build, call, onnx_dtype(call.attribute("to")))


def _onnx_cast_like(build: Any, call: Any) -> Any:
    return _cast_as_onnx_does(build, call, call.operand(1).dtype)


def _cast_as_onnx_does(build: Any, call: Any, dtype: torch.dtype) -> Any:
    """What is too large for floats of 8 bits is their largest number in ONNX, unless ``saturate`` is 0; in torch so it
    is of e4m3fn alone."""
    x, saturates = call.operand(0), call.attribute("saturate", 1)
    if dtype in OVERFLOWING and saturates:
        largest = torch.finfo(dtype).max
        x = build.clamp(x, -largest, largest)
    elif dtype == torch.float8_e4m3fn and not saturates:  # what would not be rounded to 448 is not a number
        x = build.where(build.gt(build.abs(x), 464.0), math.nan, x)
    return build.cast(x, dtype=dtype)


def _cast_symmetry(node: Node) -> Symmetry:
    """Between floating-point types a cast only rounds."""
    before, after = getattr(node.inputs[0], "dtype", None), node.attributes["dtype"]
    floats = isinstance(before, torch.dtype) and before.is_floating_point and after.is_floating_point
    return Symmetry.LINEAR if floats else Symmetry.POINTWISE


def _cast_element(x: Scalar, dtype: torch.dtype) -> Scalar | None:
    if dtype.is_floating_point and dtype.itemsize == 1:
        return scalars.float8(x, dtype)
    return x if dtype.is_floating_point else None


@pointwise(
    aten={
        "to": _to,
        "_to_copy": _to,
        "type_as": _type_as,
        "copy": _copy,
        "_cast_Float": _to_fixed(torch.float32),
        "_cast_Half": _to_fixed(torch.float16),
    },
    onnx={"Cast": _onnx_cast, "CastLike": _onnx_cast_like},
    spell=lambda onnx, node: onnx.cast(onnx.operand(0), node.attributes["dtype"]),
    samples=lambda: [
        sample(randn(2, 3), dtype=torch.int64),
        sample(randn(2, 3) > 0, dtype=torch.float32),
        sample(randn(2, 3), dtype=torch.float64),
    ],
    symmetry=_cast_symmetry,
    element=_cast_element,
)
def cast(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


# -- identities --------------------------------------------------------------------------------------------------------


def _same_value(build: Any, x: Any, *_: Any, **__: Any) -> Any:
    """Copies, detached views and layout changes are the same value in a graph without mutation."""
    return x


@pointwise(
    aten=dict.fromkeys(
        ("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh", "resolve_neg"),
        _same_value,
    ),
    onnx=["Identity"],
    samples=lambda: [sample(randn(2, 3))],
    symmetry=Symmetry.LINEAR,
    element=lambda x: x,
)
def identity(x: Tensor) -> Tensor:
    return x


# -- dropout -----------------------------------------------------------------------------------------------------------


def _dropout(build: Any, x: Any, p: float, train: bool) -> Any:
    return build.dropout(x, p=p, training=train)


def _native_dropout(build: Any, x: Any, p: float, train: bool | None) -> Any:
    """The second result is the mask, which only the backward pass reads."""
    return build.dropout(x, p=p, training=bool(train)), None


def _onnx_dropout(build: Any, call: Any) -> Any:
    """The ratio is an attribute up to opset 11 and an input from 12 on; so is the choice to train."""
    if call.wanted(1):
        raise OperatorError("the mask of Dropout is read: the node is kept as it is")
    if call.opset < 12:
        training = call.opset < 7 and not call.attribute("is_test", 0)
        return build.dropout(call.operand(0), p=call.attribute("ratio", 0.5), training=training)
    ratio = call.number(1) if call.has(1) else 0.5
    training = call.number(2) if call.has(2) else False
    if ratio is None or training is None:
        raise OperatorError("the ratio or the training mode of Dropout is computed: the node is kept as it is")
    return build.dropout(call.operand(0), p=float(ratio), training=bool(training))


def _spell_inactive(onnx: Any, node: Node) -> Any:
    """Outside of training nothing is dropped."""
    if node.attributes["training"]:
        raise onnx.refusal("it draws random numbers")
    return onnx.Identity(onnx.operand(0))


@pointwise(
    spell=_spell_inactive,
    aten={"dropout": _dropout, "native_dropout": _native_dropout},
    onnx={"Dropout": _onnx_dropout},
    samples=lambda: [sample(randn(2, 3), p=0.5, training=False), sample(randn(2, 3), p=0.5, training=True)],
    symmetry=Symmetry.LINEAR,
    layer=lambda node: f"nn.Dropout(p={node.attributes['p']})",
    random=True,
)
def dropout(x: Tensor, *, p: float = 0.5, training: bool = False) -> Tensor:
    return F.dropout(x, p, training)


def _channel_dropout_layer(node: Node) -> str | None:
    """nn.Dropout1d/2d/3d differ only in the ranks they accept: with a batch axis, rank 3, 4 and 5."""
    rank = getattr(node.inputs[0], "rank", 0)
    return f"nn.Dropout{rank - 2}d(p={node.attributes['p']})" if 3 <= rank <= 5 else None


@pointwise(
    spell=_spell_inactive,
    aten={"feature_dropout": lambda build, x, p, train: build.feature_dropout(x, p=p, training=train)},
    samples=lambda: [sample(randn(2, 3, 4, 4), p=0.5, training=False), sample(randn(2, 3, 4), p=0.5, training=True)],
    symmetry=Symmetry.LINEAR,
    layer=_channel_dropout_layer,
    random=True,
)
def feature_dropout(x: Tensor, *, p: float = 0.5, training: bool = False) -> Tensor:
    return torch.feature_dropout(x, p, training)


@pointwise(
    spell=_spell_inactive,
    aten={"alpha_dropout": lambda build, x, p, train: build.alpha_dropout(x, p=p, training=train)},
    samples=lambda: [sample(randn(2, 3), p=0.5, training=False)],
    layer=lambda node: f"nn.AlphaDropout(p={node.attributes['p']})",
    random=True,
)
def alpha_dropout(x: Tensor, *, p: float = 0.5, training: bool = False) -> Tensor:
    return F.alpha_dropout(x, p, training)
