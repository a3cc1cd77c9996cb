"""Quantization: numbers as integers, or floats of 8 bits, with a scale, for a whole tensor, for each index of an axis,
or for blocks of one.

    x ~ (q - zero_point) * scale        q = clamp(round(x / scale) + zero_point), halves to even
    x ~ q * scale                       q = the nearest float of 8 bits, what is beyond its greatest one clamped

The scales of an axis carry its Dim, those of blocks the Dim of the blocks: they are cut, permuted and shared together
with the weights they belong to. While torch exports a module to ONNX, the functions are the ONNX operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, rand, randint, randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Call
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Parameter, Value
from regauge.ir.operator import OnnxForm, operator, sample
from regauge.ir.ops.layout import axis_number, holds_no_sizes
from regauge.ir.scalars import Scalar
from regauge.ir.scales.scaling import Scaling
from regauge.ir.sizes.expressions import divide, same

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32)
"""Types that hold quantized numbers; those of fewer bits lie in the 8-bit ones."""
FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
"""The floats of 8 bits; they have no zero point."""


def scaled_rule(call: Call) -> str:
    """Scales and zero points have no axes, the one axis that is told apart, or all axes with blocks on one of them."""
    if call["axis"] is None:
        return "x..., , ? -> x..."
    axis = call.normal(call["axis"], call.rank(0))
    before, after = (
        " ".join(f"{side}{i}" for i in range(n)) for side, n in (("a", axis), ("z", call.rank(0) - axis - 1))
    )
    if call["block_size"] is None:
        return f"{before} c {after}, c, c? -> {before} c {after}"
    whole, scales = f"{before} (b k) {after}", f"{before} b {after}"
    return f"{whole}, {scales}, {scales}? -> {whole} ; whole k ; block_size = k"


def _read(build: Any, call: Any) -> tuple[Value, Value, Value | None, dict[str, Any]]:
    """Operands and attributes of QuantizeLinear and DequantizeLinear; a single scale in a vector is one for all."""
    (x, bits), (zero_point, bits_of_zero) = call.codes(0), call.codes(2)
    scale = call.operand(1)
    if zero_point is not None and bits != bits_of_zero:
        raise OperatorError("its zero points have other bits: the node is kept as it is")
    block = call.attribute("block_size", 0)
    single = all(same(size, 1) for size in scale.shape) and not block
    given = call.attribute("axis", 1)
    axis = None if single else axis_number(given, x.rank)
    if single and scale.rank:
        scale, zero_point = (None if v is None else build.reshape(v, shape=()) for v in (scale, zero_point))
    if block and (axis is None or divide(x.shape[axis], block) is None):
        raise OperatorError(f"blocks of {block} do not divide the axis: the node is kept as it is")
    if call.attribute("precision", 0):
        raise OperatorError("it says a precision of its own: the node is kept as it is")
    return x, scale, zero_point, {"axis": axis, "block_size": block or None, "bits": bits}


def _check_no_zero_point(zero_point: Value | None) -> None:
    """That of floats only says their type; raises OperatorError where it may be another number than 0."""
    if zero_point is not None and not (isinstance(zero_point, Parameter) and not zero_point.tensor.float().any()):
        raise OperatorError("its zero point is not 0: the node is kept as it is")


def _read_quantize(build: Any, call: Any) -> Any:
    from regauge.ir.ops.conversion import onnx_dtype

    x, scale, zero_point, attributes = _read(build, call)
    code = call.attribute("output_dtype", 0)
    dtype = zero_point.dtype if zero_point is not None else onnx_dtype(code) if code else torch.uint8
    if dtype in FLOATS and call.attribute("saturate", 1):
        _check_no_zero_point(zero_point)
        zero_point = None
    elif dtype not in INTEGERS:
        raise OperatorError(f"it quantizes to {dtype}: the node is kept as it is")
    if isinstance(x.dtype, torch.dtype) and x.dtype != scale.dtype:
        raise OperatorError("its scale is of another type: the node is kept as it is")
    return build.quantize(x, scale, zero_point, dtype=dtype, **attributes)


def _read_dequantize(build: Any, call: Any) -> Any:
    x, scale, zero_point, attributes = _read(build, call)
    if x.dtype in FLOATS and not call.attribute("output_dtype", 0):
        _check_no_zero_point(zero_point)
        zero_point = None
    elif x.dtype not in INTEGERS or call.attribute("output_dtype", 0):
        raise OperatorError(f"it dequantizes {x.dtype}: the node is kept as it is")
    return build.dequantize(x, scale, zero_point, **attributes)


def _spelled(onnx: Any, node: Node) -> tuple[int | None, int | None]:
    """Axis and block size as attributes; refuses what the opset does not have."""
    axis, block, bits, x = (
        node.attributes["axis"],
        node.attributes["block_size"],
        node.attributes["bits"],
        node.inputs[0],
    )
    kinds = {node.attributes.get("dtype"), x.dtype if isinstance(x, Value) else None}
    needed = 13 if axis is not None else 10
    needed = 21 if block is not None or bits is not None else 19 if kinds & {*FLOATS} else needed
    if onnx.opset < needed and not (node.attributes.get("at_load") and bits is None):
        raise onnx.refusal(
            f"it needs opset {needed}, and the model has {onnx.opset}: load it with opset={needed}, or --opset {needed}"
        )
    assert isinstance(x, Value)
    return None if axis is None else axis_number(axis, x.rank), block


def _spell_quantize(onnx: Any, node: Node) -> Any:
    axis, block = _spelled(onnx, node)
    if node.attributes["bits"] is not None:
        raise onnx.refusal(f"it gives numbers of {node.attributes['bits']} bits, which only constants may have")
    zero_point, dtype, scale = onnx.operand(2), node.attributes["dtype"], node.inputs[1]
    if zero_point is None and dtype != torch.uint8:
        shape = [int(size) for size in scale.shape] if isinstance(scale, Value) else []
        zero_point = onnx.constant(torch.zeros(shape, dtype=dtype))
    return onnx.QuantizeLinear(onnx.operand(0), onnx.operand(1), zero_point, axis=axis, block_size=block)


def _spell_dequantize(onnx: Any, node: Node) -> Any:
    axis, block = _spelled(onnx, node)
    bits = node.attributes["bits"]
    q, zero_point = (onnx.operand(slot) if bits is None else onnx.few_bits(slot, bits) for slot in (0, 2))
    if node.attributes["at_load"]:
        return _spell_at_load(onnx, node, q, zero_point, axis, block)
    return onnx.DequantizeLinear(q, onnx.operand(1), zero_point, axis=axis, block_size=block)


def _spell_at_load(onnx: Any, node: Node, q: Any, zero_point: Any, axis: int | None, block: int | None) -> Any:
    """(Cast(q) - Cast(zero_point)) * scale: runtimes compute it once, from constants, where DequantizeLinear stays."""
    stored, scale = node.inputs[0], onnx.operand(1)
    assert isinstance(stored, Value)
    shape, dtype = list(stored.shape), node.output.dtype
    zero_point = None if zero_point is None else onnx.cast(zero_point, dtype)
    if axis is not None:  # a vector is laid along its axis; blocks, which have all axes, along one of their own
        beside = [axis + 1] if block is not None else range(1, stored.rank - axis)
        scale = onnx.unsqueeze(scale, *beside)
        zero_point = None if zero_point is None else onnx.unsqueeze(zero_point, *beside)
    x = onnx.cast(q, dtype)
    if block is not None and axis is not None:
        x = onnx.Reshape(x, onnx.sizes([*shape[:axis], -1, block, *shape[axis + 1 :]]))
    x = x if zero_point is None else onnx.Sub(x, zero_point)
    x = onnx.Mul(x, scale)
    return x if block is None else onnx.Reshape(x, onnx.sizes(shape))


def _quantized_samples() -> list[Any]:
    scales = rand(4) + 0.5
    return [
        sample(3 * randn(2, 4, 3), torch.tensor(0.05), torch.tensor(130, dtype=torch.uint8), dtype=torch.uint8),
        sample(3 * randn(2, 4, 3), torch.tensor(0.05)),
        sample(3 * randn(4, 6), scales / 40, axis=0),
        sample(3 * randn(2, 4, 3), scales / 40, randint(-9, 9, (4,)).to(torch.int8), axis=1),
        sample(3 * randn(5, 6), (rand(5, 3) + 0.5) / 4, axis=1, block_size=2, bits=4),
        sample(900 * randn(4, 6), scales, axis=0, dtype=torch.float8_e4m3fn),
        sample(1e5 * randn(4, 6), scales, axis=0, dtype=torch.float8_e5m2),
    ]


def _codes_of(dtype: torch.dtype, bits: int | None) -> tuple[float, float]:
    """The least and the greatest code."""
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if bits is None:
        return limits.min, limits.max
    return (0, 2**bits - 1) if limits.min == 0 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _quantized_element(
    x: Scalar, scale: Scalar, zero_point: Scalar | None = None, *, bits: int | None, dtype: torch.dtype, **_: Any
) -> Scalar | None:
    if dtype.is_floating_point:
        return scalars.float8(scalars.clamp(x / scale, *_codes_of(dtype, None)), dtype)
    if dtype not in (torch.int8, torch.uint8):
        return None
    q = scalars.round_(x / scale)
    return scalars.code(
        scalars.clamp(q if zero_point is None else q + scalars.real(zero_point), *_codes_of(dtype, bits))
    )


@operator(
    rule=scaled_rule,
    onnx={"QuantizeLinear": OnnxForm(read=_read_quantize, write=holds_no_sizes)},
    spell=_spell_quantize,
    samples=_quantized_samples,
    coding=True,
    scaling=Scaling(powers={"x scale": 0}),
    element=_quantized_element,
)
def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
    block_size: int | None = None,
    bits: int | None = None,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    if torch.onnx.is_in_onnx_export():
        options = {"axis": 1 if axis is None else axis} | ({} if block_size is None else {"block_size": block_size})
        zero_point = torch.zeros_like(scale).to(dtype) if zero_point is None else zero_point
        version = 21 if block_size is not None else 19 if dtype.is_floating_point else 13
        return torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, scale, zero_point), {**options}, dtype=dtype, shape=x.shape, version=version
        )
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    low, high = limits.min, limits.max
    if bits is not None:
        low, high = (0, 2**bits - 1) if low == 0 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if block_size is not None:
        scale = scale.repeat_interleave(block_size, axis)
        zero_point = None if zero_point is None else zero_point.repeat_interleave(block_size, axis)
    elif axis is not None:
        shape = [-1 if i == axis % x.dim() else 1 for i in range(x.dim())]
        scale = scale.reshape(shape)
        zero_point = None if zero_point is None else zero_point.reshape(shape)
    q = x / scale if dtype.is_floating_point else torch.round(x / scale)
    q = q if zero_point is None else q + zero_point
    return torch.clamp(q, low, high).to(dtype)


def _dequantized_samples() -> list[Any]:
    def numbers(*shape: int) -> Tensor:
        return randint(-128, 128, shape).to(torch.int8)

    return [
        sample(randint(0, 256, (2, 4, 3)).to(torch.uint8), rand(()), torch.tensor(130, dtype=torch.uint8)),
        sample(numbers(2, 4, 3), rand(())),
        sample(numbers(4, 6), rand(4), axis=0),
        sample(numbers(2, 4, 3), rand(4), randint(-9, 9, (4,)).to(torch.int8), axis=1),
        sample(randint(-(2**30), 2**30, (4,), dtype=torch.int32), rand(4) * 1e-6, axis=0),
        sample(randint(-8, 8, (5, 6)).to(torch.int8), rand(5, 3), axis=1, block_size=2, bits=4),
        sample(randn(4, 6).to(torch.float8_e4m3fn), rand(4), axis=0),
        sample(randn(2, 4).to(torch.float8_e5m2), rand(())),
        sample(numbers(4, 6, 3), rand(6), randint(-9, 9, (6,)).to(torch.int8), axis=1, at_load=True),
        sample(numbers(4, 6, 3), rand(4, 3, 3), axis=1, block_size=2, at_load=True),
    ]


def _dequantized_element(q: Scalar, scale: Scalar, zero_point: Scalar | None = None, **_: Any) -> Scalar:
    return (scalars.real(q) if zero_point is None else scalars.real(q) - scalars.real(zero_point)) * scale


@operator(
    rule=scaled_rule,
    onnx={"DequantizeLinear": OnnxForm(read=_read_dequantize, write=holds_no_sizes)},
    spell=_spell_dequantize,
    samples=_dequantized_samples,
    coding=True,
    expands=True,
    scaling=Scaling(powers={"scale": 1}),
    element=_dequantized_element,
)
def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
    block_size: int | None = None,
    bits: int | None = None,
    at_load: bool = False,
) -> Tensor:
    """``at_load``: of constants, and in ONNX spelled so that runtimes compute it once, when they load the file."""
    if torch.onnx.is_in_onnx_export() and not at_load:
        options = {"axis": 1 if axis is None else axis} | ({} if block_size is None else {"block_size": block_size})
        operands = (q, scale) if zero_point is None else (q, scale, zero_point)
        version = 21 if block_size is not None else 19 if q.is_floating_point() else 13
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", operands, {**options}, dtype=scale.dtype, shape=q.shape, version=version
        )
    if at_load and zero_point is not None:  # before it is reshaped: a file has it in few bits
        zero_point = zero_point.to(scale.dtype)
    if block_size is not None:
        scale = scale.repeat_interleave(block_size, axis)
        zero_point = None if zero_point is None else zero_point.repeat_interleave(block_size, axis)
    elif axis is not None:
        shape = [-1 if i == axis % q.dim() else 1 for i in range(q.dim())]
        scale = scale.reshape(shape)
        zero_point = None if zero_point is None else zero_point.reshape(shape)
    if at_load and zero_point is None and torch.onnx.is_in_onnx_export():  # else its names may meet the model's own
        code = {torch.float32: 1, torch.float64: 11, torch.float16: 10}[scale.dtype]
        x = torch.onnx.ops.symbolic("Cast", (q,), {"to": code}, dtype=scale.dtype, shape=q.shape, version=13)
        return torch.onnx.ops.symbolic("Mul", (x, scale), {}, dtype=scale.dtype, shape=q.shape, version=14)
    if at_load:
        return (q.to(scale.dtype) if zero_point is None else q.to(scale.dtype) - zero_point) * scale
    if q.is_floating_point():
        return q.to(scale.dtype) * scale
    centred = q.to(torch.int32) if zero_point is None else q.to(torch.int32) - zero_point.to(torch.int32)
    return centred.to(scale.dtype) * scale
