"""One ONNX node as an operator's reader sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
import torch

from regauge.frontends.onnx_model.scope import Entry, Scope
from regauge.frontends.onnx_model.weights import dtype_of, read_tensor, torch_from_array
from regauge.ir.errors import LoadError, OperatorError
from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import Size

_KINDS = onnx_ir.AttributeType


def resolved_attributes(node: onnx_ir.Node, scope: Scope) -> dict[str, onnx_ir.Attr]:
    """A node's attributes; inside a function, references are replaced by what the call gives."""
    result = {}
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            given = scope.attributes.get(attribute.ref_attr_name or "")
            if given is None:
                continue
            attribute = onnx_ir.Attr(name, given.type, given.value)
        result[name] = attribute
    return result


def plain_attribute(attribute: onnx_ir.Attr) -> Any:
    """An attribute as Python numbers, text, torch tensors, or onnx_ir graphs."""
    match attribute.type:
        case _KINDS.TENSOR:
            return read_tensor(attribute.value)
        case _KINDS.INTS | _KINDS.FLOATS | _KINDS.STRINGS:
            return tuple(attribute.value)
    return attribute.value


class OnnxCall:
    """A node of an ONNX model: its attributes, its operands as Values, and what is known of their contents."""

    def __init__(self, node: onnx_ir.Node, scope: Scope) -> None:
        self.node = node
        self.op_type = node.op_type
        self.domain = "" if node.domain == "ai.onnx" else node.domain
        self.scope = scope
        self._attributes: Mapping[str, onnx_ir.Attr] = resolved_attributes(node, scope)
        self._asked: set[str | int] = set()  # names of attributes and numbers of inputs that a reader has looked at

    @property
    def opset(self) -> int:
        """Version of the node's operator set."""
        return self.node.version or self.scope.opsets.get(self.domain, 1)

    @property
    def outputs(self) -> int:
        """Number of declared outputs, unnamed ones in the middle included."""
        return len(self.node.outputs)

    @property
    def count(self) -> int:
        """Number of declared inputs, absent ones in the middle included."""
        return len(self.node.inputs)

    @property
    def inputs(self) -> list[Value | None]:
        """Every declared input as a Value, None where it is absent."""
        return [self.operand(i) if self.has(i) else None for i in range(len(self.node.inputs))]

    def has(self, index: int) -> bool:
        self._asked.add(index)
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def entry(self, index: int) -> Entry | None:
        self._asked.add(index)
        onnx = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if onnx is None else self.scope.find(onnx)

    def operand(self, index: int) -> Value:
        """An input as a Value of the graph; raises LoadError when it is absent."""
        self._asked.add(index)
        onnx = self.node.inputs[index] if index < len(self.node.inputs) else None
        if onnx is None:
            raise LoadError(
                f"{self.label} has no input {index}: the operator needs it, check the model with onnx.checker"
            )
        return self.scope.operand(onnx)

    def codes(self, index: int) -> tuple[Value | None, int | None]:
        """An input that is dequantized, None where it is absent, and its bits where they are fewer than a byte has."""
        self._asked.add(index)
        onnx = self.node.inputs[index] if index < len(self.node.inputs) else None
        return (None, None) if onnx is None else self.scope.codes(onnx)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute as a plain Python value or torch tensor; the default where it is not given."""
        self._asked.add(name)
        attribute = self._attributes.get(name)
        return default if attribute is None else plain_attribute(attribute)

    def check_restated(self, name: str, sizes: Sequence[Size] | Size) -> None:
        """Raise OperatorError where an attribute that says sizes of operands again says others."""
        given = self.attribute(name)
        if given is not None and given != (tuple(sizes) if isinstance(sizes, Sequence) else sizes):
            raise OperatorError(f"its attribute {name}={given!r} is not what its operands say, {sizes}")

    def passes_over(self, *names: str | int) -> None:
        """Attributes (names) and inputs (numbers) that say nothing in the form of the node that is at hand."""
        self._asked.update(names)

    @property
    def unread_attributes(self) -> list[str]:
        """Attributes that no reader has asked for yet."""
        return [name for name in self._attributes if name not in self._asked]

    @property
    def unread_inputs(self) -> list[int]:
        """Inputs that are there and that no reader has asked for yet."""
        inputs = enumerate(self.node.inputs)
        return [index for index, value in inputs if value is not None and index not in self._asked]

    @property
    def attribute_names(self) -> tuple[str, ...]:
        return tuple(self._attributes)

    def sizes(self, index: int) -> tuple[Size, ...] | None:
        """The integers of an input where they are known, dynamic sizes among them as expressions; else None."""
        entry = self.entry(index)
        if entry is None or entry.content is None or not entry.content.integral or entry.content.undecided:
            return None
        return entry.content.sizes()

    def constant(self, index: int) -> torch.Tensor | None:
        """The content of an input that does not depend on the model's inputs or on dynamic sizes; else None."""
        entry = self.entry(index)
        if entry is None:
            return None
        if entry.tensor is not None:
            return read_tensor(entry.tensor)  # type: ignore[no-any-return]
        if entry.content is not None and entry.content.static:
            dtype = dtype_of(entry.content.data_type)
            return torch_from_array(np.array(entry.content.array), dtype)  # type: ignore[no-any-return]
        return None

    def number(self, index: int) -> Any:
        """The only element of an input where it is known: a Python number, or an expression of dynamic sizes."""
        tensor = self.constant(index)
        if isinstance(tensor, torch.Tensor):
            return tensor.item() if tensor.numel() == 1 else None
        entry = self.entry(index)
        if entry is None or entry.content is None or entry.content.array.size != 1 or entry.content.undecided:
            return None
        return entry.content.array.reshape(-1)[0]

    def wanted(self, index: int) -> bool:
        """Whether anything reads an output."""
        if index >= len(self.node.outputs):
            return False
        value = self.node.outputs[index]
        return bool(value.name) and (bool(value.uses()) or value.is_graph_output())

    @property
    def label(self) -> str:
        """What messages call the node."""
        return f"{self.op_type} node {self.node.name!r}" if self.node.name else f"{self.op_type} node"

    @property
    def where(self) -> str:
        return self.label
