"""Integers of few bits: the IR holds them in bytes, an ONNX file two or four to a byte."""

from __future__ import annotations

import onnx_ir
import torch

from regauge.ir.graph import Graph, Operand, Parameter, Value

FOUR_BITS_SINCE, TWO_BITS_SINCE = 21, 25  # opsets


def stored_type(parameter: Value, bits: int, opset: int) -> onnx_ir.DataType | None:
    """The least ONNX type that holds so many bits in this opset; None where it is the one of a byte."""
    wide = 2 if bits <= 2 and opset >= TWO_BITS_SINCE else 4
    if bits > 4 or opset < FOUR_BITS_SINCE:
        return None
    return onnx_ir.DataType[f"{'U' if parameter.dtype == torch.uint8 else ''}INT{wide}"]


def is_packed(kind: onnx_ir.DataType) -> bool:
    """Whether several integers of a type share a byte."""
    return kind.is_integer() and kind.bitwidth < 8


def packed(parameter: Parameter, kind: onnx_ir.DataType) -> onnx_ir.TensorProtocol:
    """The parameter as a tensor of that type, made when it is written."""
    weight = parameter.weight
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.Tensor(weight.load().numpy().astype(kind.numpy()), dtype=kind),
        dtype=kind,
        shape=onnx_ir.Shape(parameter.shape),
    )


def pack_initializers(model: onnx_ir.Model, graph: Graph) -> None:
    """Store what a graph dequantizes from few bits as such, in a model that has it in bytes under the same names."""
    opset = model.opset_imports.get("", 1)
    for _, node in graph.walk():
        bits = node.attributes.get("bits") if node.op == "dequantize" else None
        if isinstance(bits, int):
            for operand in (node.inputs[0], *node.inputs[2:3]):
                _pack(model, operand, bits, opset)


def _pack(model: onnx_ir.Model, operand: Operand, bits: int, opset: int) -> None:
    value = model.graph.initializers.get(operand.name) if isinstance(operand, Parameter) else None
    if value is None or not isinstance(operand, Parameter):
        return
    kind = stored_type(operand, bits, opset)
    if kind is not None:
        value.const_value = packed(operand, kind)
        value.const_value.name = value.name
        value.dtype = kind
