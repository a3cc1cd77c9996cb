"""The argument of an operator's ``OnnxForm.write``: the means to put changed sizes back into one ONNX node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir
import sympy
import torch

from regauge.backends.onnx_model.carrier import Carrier
from regauge.backends.onnx_model.contents import Contents, gives_sizes
from regauge.backends.onnx_model.size_nodes import SizeSource, build_vector
from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph, Node
from regauge.ir.sizes.expressions import Size
from regauge.ir.sizes.onnx_contents import constant_tensor

# Operators that can take a dynamic size from their operand instead of having it computed, and what they are read as.
FOLDED_SIZES = {"Reshape": "reshape", "Expand": "expand"}


class OnnxPatch:
    """Changes to the copy of one carried ONNX node; whatever is not set stays as it was.

    ``graph`` is the graph or region whose nodes stand for the ONNX node, ``node`` the ONNX node that will be written,
    ``opset`` the version of its domain.
    """

    def __init__(
        self,
        carrier: Carrier,
        origin: onnx_ir.Node,
        graph: Graph,
        nodes: Sequence[Node],
        sources: SizeSource,
        contents: Contents,
        *,
        fold: bool = False,
    ) -> None:
        self.fold = fold
        self.carrier = carrier
        self.origin = origin
        self.node = carrier.nodes[origin]
        self.graph = graph
        self.nodes = tuple(nodes)
        self._sources = sources
        self._contents = contents
        self._replaced: list[onnx_ir.Value | None] = []
        self._written: set[int] = set()

    @property
    def label(self) -> str:
        """What messages call the ONNX node."""
        return f"{self.node.name or self.node.outputs[0].name} ({self.node.op_type})"

    @property
    def opset(self) -> int:
        imports = self.carrier.model.opset_imports
        return imports.get(self.node.domain) or imports.get("ai.onnx", 1)

    def attribute(self, name: str, value: Any) -> None:
        """Set an attribute to a plain value, or remove it with None. Raises EmitError for a dynamic size."""
        if value is None:
            self.carrier.edits += self.node.attributes.pop(name, None) is not None
            return
        value = _plain(value, f"{self.label}: the attribute {name!r}")
        before = self.node.attributes.get(name)
        kind = None if before is None or before.is_ref() else before.type
        self.node.attributes[name] = onnx_ir.convenience.convert_attribute(name, value, kind)

    def has_attribute(self, name: str) -> bool:
        return name in self.node.attributes

    def set_constant(self, index: int, tensor: Any) -> None:
        """Let input ``index`` be a constant with this content (a torch tensor, an array or numbers)."""
        self._written.add(index)
        array = tensor.detach().cpu().numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor)
        before = self._input(index)
        if before is not None and not self.carrier.is_input(before) and _holds(before, array):
            return
        self._replace(index, self.carrier.insert_constant(self.node, array, self._name(index), before))

    def remove_input(self, index: int) -> None:
        """Let an optional input be absent."""
        self._written.add(index)
        if self._input(index) is not None:
            self._replace(index, None)

    def set_sizes(self, index: int, sizes: Sequence[Size] | Size) -> None:
        """Let input ``index`` be the vector of these sizes, a scalar for one size; dynamic ones are computed when run.

        Where the model as it is arrives at these sizes by itself, it stays. Raises EmitError where a dynamic size
        cannot be computed from the graph's inputs or the node's operands.
        """
        self._written.add(index)
        scalar = not isinstance(sizes, list | tuple)
        wanted: list[Size] = [sizes] if scalar else list(sizes)  # type: ignore[arg-type]
        arrives = self._arrives(index, wanted)
        if arrives and not (self.fold and self._is_computed(index)):
            return
        if self.node.op_type == "Reshape" and index == 1:
            wanted = self._reshape_target(wanted)
        if self.node.op_type == "Expand" and arrives:
            wanted = self._expand_target(wanted)
        if arrives and not all(isinstance(size, int) for size in wanted):
            return
        if all(isinstance(size, int) for size in wanted):
            dtype = self._integer_type(index)
            self.set_constant(index, np.array(wanted[0] if scalar else wanted, dtype=dtype))
            return
        base, dtype = self._name(index), self._integer_type(index)
        vector = build_vector(self.carrier, self.node, wanted, base, self._sources, dtype)
        if scalar:
            zero = self.carrier.insert_constant(self.node, np.array(0, dtype=np.int64), f"{base}_zero")
            vector = self.carrier.insert(self.node, "Gather", [vector, zero], f"{base}_scalar")
        self._replace(index, vector)

    def keep_content(self, index: int, known: Any) -> None:
        """Let input ``index`` keep the content it had at import, unless the operator's writer has set it."""
        if index in self._written:
            return
        if known.static:
            self.set_constant(index, known.array)
        elif known.integral:
            self.set_sizes(index, known.sizes() if known.array.ndim else known.sizes()[0])
        else:
            raise EmitError(
                f"{self.label}: input {index} follows from sizes that were cut, and cannot be kept: keep that axis"
            )

    def finish(self) -> None:
        """Remove the nodes and constants that nothing reads any more."""
        self.carrier.drop_unused(self._replaced)

    def _arrives(self, index: int, wanted: list[Size]) -> bool:
        before = self.origin.inputs[index] if index < len(self.origin.inputs) else None
        operand = self._sources.shape_of(self.node.inputs[0]) if self.node.inputs else ()
        return before is not None and gives_sizes(self.node.op_type, self._contents.of(before), operand, wanted)

    def _reshape_target(self, sizes: list[Size]) -> list[Size]:
        """Dynamic sizes of a Reshape as 0 (copied from the operand) and -1 (the rest), where those can say them."""
        if all(isinstance(size, int) for size in sizes):
            return sizes
        allow_zero = self.node.attributes.get("allowzero")
        copies = allow_zero is None or not allow_zero.value
        operand = self._sources.shape_of(self.node.inputs[0])
        result = list(sizes)
        for axis, size in enumerate(sizes):
            if copies and not isinstance(size, int) and axis < len(operand) and operand[axis] == size:
                result[axis] = 0
        dynamic = [axis for axis, size in enumerate(result) if not isinstance(size, int)]
        if len(dynamic) == 1:
            result[dynamic[0]] = -1
        return result if len(dynamic) <= 1 else list(sizes)

    def _expand_target(self, sizes: list[Size]) -> list[Size]:
        """Dynamic sizes that the operand has already, as 1: such an axis keeps its size."""
        operand = self._sources.shape_of(self.node.inputs[0])
        given = [1] * (len(sizes) - len(operand)) + list(operand)
        return [
            1 if not isinstance(size, int) and size == own else size for size, own in zip(sizes, given, strict=True)
        ]

    def _is_computed(self, index: int) -> bool:
        """Whether an input is computed when the model runs."""
        value = self._input(index)
        return value is not None and constant_tensor(value) is None

    def _input(self, index: int) -> onnx_ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def _replace(self, index: int, value: onnx_ir.Value | None) -> None:
        if index >= len(self.node.inputs):
            self.node.resize_inputs(index + 1)
        self._replaced.append(self._input(index))
        self.node.replace_input_with(index, value)
        self.carrier.edits += 1

    def _name(self, index: int) -> str:
        before = self._input(index)
        own = before.name if before is not None else None
        return f"{own or self.node.outputs[0].name}_sized"

    def _integer_type(self, index: int) -> np.dtype[Any]:
        before = self._input(index)
        return np.dtype(np.int32 if before is not None and before.dtype == onnx_ir.DataType.INT32 else np.int64)


def _plain(value: Any, what: str) -> Any:
    if isinstance(value, sympy.Basic):
        raise EmitError(f"{what} would be the dynamic size {value}, but ONNX attributes hold numbers: keep that axis")
    if isinstance(value, torch.Tensor):
        return onnx_ir.tensor(value.detach().cpu().numpy())
    if isinstance(value, list | tuple):
        return [_plain(part, what) for part in value]
    return int(value) if isinstance(value, bool) else value


def _holds(value: onnx_ir.Value, array: np.ndarray) -> bool:
    """Whether a value is a constant with exactly this content."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.nbytes > 1 << 16:
        return False
    content = tensor.numpy()
    return bool(content.dtype == array.dtype and content.shape == array.shape and np.array_equal(content, array))
