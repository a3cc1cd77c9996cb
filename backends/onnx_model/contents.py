"""Evaluates the shape arithmetic of a carried model under the shapes that its values have now."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
import torch

from regauge.ir.errors import RegaugeError
from regauge.ir.folding.onnx_operators import Question, fold
from regauge.ir.sizes.expressions import Size, divide, product, same
from regauge.ir.sizes.onnx_contents import LIMIT, Content, Unknown, constant_tensor, content, of_shape


class Contents:
    """Contents of values of the original model under the shapes that the values of a graph have now.

    ``shapes`` gives the present shape for an original value, ``inputs`` are those that are inputs of the graph (old
    exporters list weights among them). A content is None where it depends on data.
    """

    def __init__(
        self,
        shapes: Mapping[onnx_ir.Value, Sequence[Size]],
        opsets: Mapping[str, int],
        inputs: Container[onnx_ir.Value],
    ) -> None:
        self._shapes = shapes
        self._inputs = inputs
        self._opset = opsets.get("") or opsets.get("ai.onnx", 1)
        self._known: dict[onnx_ir.Value, Content | None] = {}

    def of(self, value: onnx_ir.Value | None) -> Content | None:
        if value is None:
            return None
        if value not in self._known:
            self._known[value] = None  # also the answer for a value that depends on itself
            try:
                self._known[value] = self._compute(value)
            except (Unknown, RegaugeError, RecursionError):
                pass
        return self._known[value]

    def shape(self, value: onnx_ir.Value) -> Sequence[Size] | None:
        """The present shape of a value, where it is known."""
        if value in self._shapes:
            return self._shapes[value]
        found = self.of(value)
        return None if found is None else found.array.shape

    def _compute(self, value: onnx_ir.Value) -> Content | None:
        if value.is_graph_input() and (value in self._inputs or not value.is_initializer()):
            return None
        constant = constant_tensor(value)
        if constant is not None:
            if constant.size > LIMIT or constant.dtype == onnx_ir.DataType.STRING or constant.dtype.bitwidth < 8:
                return None
            return Content(np.array(constant.numpy()), constant.dtype)
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or any(a.is_ref() for a in node.attributes.values()):
            return None
        if node.op_type in ("Shape", "Size"):
            return self._measured(node)
        if any(v is not None and self.of(v) is None for v in node.inputs):
            return None
        inputs = [self.of(v) for v in node.inputs]
        opset = node.version or self._opset
        question = Question(node.op_type, opset, inputs, attribute_of(node), len(node.outputs))
        return fold(question)[value.index() or 0]

    def _measured(self, node: onnx_ir.Node) -> Content | None:
        assert node.inputs[0] is not None
        shape = self.shape(node.inputs[0])
        if shape is None:
            return None
        if node.op_type == "Size":
            return content(np.array(product(shape), dtype=object), onnx_ir.DataType.INT64)
        read = attribute_of(node)
        return of_shape(list(shape)[slice(read("start", 0), read("end"))])


def attribute_of(node: onnx_ir.Node) -> Any:
    """A function that reads attributes of a node as plain values, tensors as arrays."""

    def read(name: str, default: Any = None) -> Any:
        attribute = node.attributes.get(name)
        if attribute is None:
            return default
        if attribute.type == onnx_ir.AttributeType.TENSOR:
            return attribute.value.numpy()
        return attribute.value

    return read


def equal_contents(a: Content | None, b: Content | None) -> bool:
    """Whether two contents are the same for all values of the dynamic sizes in them; unknown ones are not."""
    if a is None or b is None or a.array.shape != b.array.shape:
        return False
    if a.static and b.static:
        return bool(np.array_equal(a.array, b.array, equal_nan=a.array.dtype.kind == "f"))
    pairs = zip(a.array.reshape(-1).tolist(), b.array.reshape(-1).tolist(), strict=True)
    return all(same(x, y) for x, y in pairs)


def is_content(array: np.ndarray, tensor: torch.Tensor) -> bool:
    """Whether an array is what a tensor holds."""
    if array.shape != tuple(tensor.shape):
        return False
    return bool(torch.equal(torch.as_tensor(np.array(array)).to(tensor.dtype), tensor))


def gives_sizes(op_type: str, found: Content | None, operand: Sequence[Size], sizes: Sequence[Size]) -> bool:
    """Whether an input with this content makes an operator reach these sizes, by its own rules for 0, -1 and 1."""
    if found is None or not found.integral:
        return False
    target = list(found.sizes())
    if op_type == "Reshape":
        target, sizes = _poured(target, operand), _poured(list(sizes), operand)
    if op_type == "Expand" and len(operand) <= len(sizes) >= len(target):
        target, sizes = (_broadcast(list(asked), operand, len(sizes)) for asked in (target, sizes))
    return len(target) == len(sizes) and all(same(a, b) for a, b in zip(target, sizes, strict=True))


def _poured(target: list[Size], operand: Sequence[Size]) -> list[Size]:
    """A Reshape target with its 0 and -1 replaced by the sizes they stand for."""
    result: list[Size] = [operand[i] if t == 0 and i < len(operand) else t for i, t in enumerate(target)]
    if -1 in result:
        hole = result.index(-1)
        rest = divide(product(operand), product(t for i, t in enumerate(result) if i != hole))
        result[hole] = -1 if rest is None else rest
    return result


def _broadcast(target: list[Size], operand: Sequence[Size], rank: int) -> list[Size]:
    asked = [1] * (rank - len(target)) + target
    given = [1] * (rank - len(operand)) + list(operand)
    return [g if a == 1 else a for a, g in zip(asked, given, strict=True)]
