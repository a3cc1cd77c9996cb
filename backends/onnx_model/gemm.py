"""Joins what is left of a dissolved Gemm into one Gemm again.

    Transpose(A), MatMul(., B), Mul(., alpha), Add(., C)          Gemm(A, B, C; transA, alpha)

A Gemm is read as the nodes that it stands for, so that a rule may change one of them; spelled one by one they would be
more ONNX nodes than there were. Only nodes that were spelled just now are taken in.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir

from regauge.backends.onnx_model.carrier import Carrier
from regauge.ir.sizes.expressions import Size, same
from regauge.ir.sizes.onnx_contents import constant_tensor

Shapes = Callable[[onnx_ir.Value | None], tuple[Size, ...]]
_KINDS = {onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE}
_TRANSPOSED = ("transA", "transB")


def join_gemms(cores: Iterable[onnx_ir.Node], new: Container[Any], carrier: Carrier, shape_of: Shapes) -> None:
    """Let each of these nodes that multiplies two matrices take in the new nodes around it that a Gemm can say."""
    for core in cores:
        if core.graph is not None and core.op_type in ("MatMul", "Gemm") and core.outputs[0].dtype in _KINDS:
            if all(len(_shape(operand, shape_of) or ()) == 2 for operand in core.inputs[:2]):
                _Joined(core, new, carrier, shape_of).write()


@dataclass
class _Step:
    """A node that computes ``factor * operand``, or that adds an operand where there is no factor."""

    node: onnx_ir.Node
    operand: onnx_ir.Value
    factor: float | None = None


class _Joined:
    """One product and what it takes in; ``tail`` is the node that gives the result, and becomes the Gemm."""

    def __init__(self, core: onnx_ir.Node, new: Container[Any], carrier: Carrier, shape_of: Shapes) -> None:
        self.core = self.tail = core
        self.new = new
        self.carrier = carrier
        self.shape_of = shape_of
        given = {name: attribute.value for name, attribute in core.attributes.items()}
        self.turned = {name: bool(given.get(name, 0)) for name in _TRANSPOSED}
        self.factors = {name: float(given.get(name, 1.0)) for name in ("alpha", "beta")}
        self.operands = [core.inputs[0], core.inputs[1]]
        self.bias = core.inputs[2] if len(core.inputs) > 2 else None

    def write(self) -> None:
        for index, name in enumerate(_TRANSPOSED):
            self._transposed(index, name)
        if self.bias is None:
            self._scaled()
            self._shifted()
        before = list(self.core.inputs)
        if self.tail is self.core and self.operands == before[:2]:
            return
        if self.bias is None and self.carrier.opset < 11:  # a Gemm has to have its third operand
            zero = onnx_ir.Tensor(np.zeros((), dtype=self.core.outputs[0].dtype.numpy()))  # type: ignore[union-attr]
            self.bias = self.carrier.add_initializer(f"{self.core.name}_zero", zero)
        attributes: dict[str, Any] = {name: int(turned) for name, turned in self.turned.items() if turned}
        attributes |= {name: factor for name, factor in self.factors.items() if factor != 1}
        left = [self.core.outputs[0], *before, *self.tail.inputs]
        self.tail.op_type = "Gemm"
        self.tail.attributes.clear()
        for name, value in attributes.items():
            self.tail.attributes[name] = onnx_ir.convenience.convert_attribute(name, value)
        inputs = [*self.operands, *([] if self.bias is None else [self.bias])]
        self.tail.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            self.tail.replace_input_with(index, value)
        self.carrier.drop_unused(value for value in left if value not in inputs)

    def _transposed(self, index: int, name: str) -> None:
        """An operand that a node turns for this product alone."""
        operand = self.operands[index]
        producer = None if operand is None else operand.producer()
        if producer is None or producer not in self.new or not _read_once(operand) or producer.op_type != "Transpose":
            return
        permutation = producer.attributes.get("perm")
        if permutation is not None and tuple(permutation.value) == (1, 0):
            self.operands[index] = producer.inputs[0]
            self.turned[name] = not self.turned[name]

    def _scaled(self) -> None:
        step = self._behind()
        if step is not None and step.factor is not None:
            self.factors["alpha"], self.tail = step.factor, step.node

    def _shifted(self) -> None:
        step = self._behind()
        if step is None or step.factor is not None or not self._spreads(step.operand):
            return
        self.bias, self.tail = step.operand, step.node
        producer = self.bias.producer()
        if producer is not None and producer in self.new and _read_once(self.bias):
            for index, operand in enumerate(producer.inputs):
                factor = _factor(producer, index)
                if factor is not None and operand is not None and self._spreads(operand):
                    self.bias, self.factors["beta"] = operand, factor

    def _behind(self) -> _Step | None:
        """The scale or the addition that alone reads the result so far."""
        result = self.tail.outputs[0]
        if not _read_once(result):
            return None
        (use,) = result.uses()
        node, index = use.node, use.idx
        if node not in self.new or node.graph is not self.core.graph or node.op_type not in ("Mul", "Add"):
            return None
        other = node.inputs[1 - index]
        if other is None:
            return None
        factor = _factor(node, index)
        return _Step(node, other, factor) if node.op_type == "Add" or factor is not None else None

    def _spreads(self, value: onnx_ir.Value) -> bool:
        """Whether an operand is broadcast to the result, and not the result to it."""
        own, whole = _shape(value, self.shape_of), _shape(self.core.outputs[0], self.shape_of)
        if own is None or whole is None or len(whole) != 2 or len(own) > 2:
            return False
        if len(own) != 1 and any(map(_is_dequantized, self.core.inputs[:2])):
            return False  # kernels that read integers take a vector at most
        return all(same(a, 1) or same(a, b) for a, b in zip(reversed(own), reversed(whole), strict=False))


def _shape(value: onnx_ir.Value | None, shape_of: Shapes) -> tuple[Size, ...] | None:
    known = shape_of(value)
    if known or value is None or value.shape is None:
        return known or None
    dims = tuple(value.shape)
    return dims if all(isinstance(dim, int) for dim in dims) else None


def _is_dequantized(value: onnx_ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _read_once(value: onnx_ir.Value | None) -> bool:
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def _factor(node: onnx_ir.Node, index: int) -> float | None:
    """The number by which a Mul multiplies its operand ``index``, where a Gemm's attribute can say it exactly."""
    other = node.inputs[1 - index] if node.op_type == "Mul" else None
    tensor = None if other is None or other.is_graph_input() else constant_tensor(other)
    if tensor is None or tuple(tensor.shape) != ():
        return None
    number = float(tensor.numpy())
    return number if float(np.float32(number)) == number else None
