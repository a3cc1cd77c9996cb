"""A clone of the ONNX model a graph was loaded from, and the way from each original part to its copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir

from regauge.backends.onnx_write import all_graphs, tensor_slots


class Carrier:
    """The clone and its maps. Whatever is not changed through it is serialised as it was.

    ``nodes`` and ``values`` lead from the parts of the original model, which the IR holds as origins, to the copies.
    """

    def __init__(self, model: onnx_ir.Model) -> None:
        self.model = _clone(model)
        self.nodes: dict[onnx_ir.Node, onnx_ir.Node] = {}
        self.values: dict[onnx_ir.Value, onnx_ir.Value] = {}
        self._match(model.graph, self.model.graph)
        for key, function in model.functions.items():
            self._match(function.graph, self.model.functions[key].graph)
        self.function_graphs = {g for f in self.model.functions.values() for g in (f.graph, *f.subgraphs())}
        self._names = {name for graph in all_graphs(self.model) for name in _names(graph)}

    def _match(self, old: onnx_ir.Graph, new: onnx_ir.Graph) -> None:
        self.values.update(zip(old.inputs, new.inputs, strict=True))
        self.values.update(zip(old.initializers.values(), new.initializers.values(), strict=True))
        for node, copied in zip(old, new, strict=True):
            self.nodes[node] = copied
            self.values.update(zip(node.outputs, copied.outputs, strict=True))
            for name in node.attributes:
                pairs = zip(subgraphs(node.attributes[name]), subgraphs(copied.attributes[name]), strict=True)
                for inner, inner_copy in pairs:
                    self._match(inner, inner_copy)

    def copy_of(self, origin: Any) -> onnx_ir.Value | None:
        """The copy of an original value; None for a value that is no part of the model (any more)."""
        return self.values.get(origin)

    def unique(self, base: str) -> str:
        """A name that no node or value of the model has, in any scope, derived from ``base``."""
        candidate, number = base, 0
        while candidate in self._names:
            number += 1
            candidate = f"{base}_{number}"
        self._names.add(candidate)
        return candidate

    @property
    def opset(self) -> int:
        """The version of the standard operators that the model imports."""
        imports = self.model.opset_imports
        return imports.get("") or imports.get("ai.onnx", 1)

    def add_initializer(self, base: str, tensor: Any) -> onnx_ir.Value:
        """An initializer of the main graph, which every nested graph sees, named after ``base``."""
        value = onnx_ir.Value(
            name=self.unique(base),
            shape=onnx_ir.Shape(tensor.shape),
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph = self.model.graph
        graph.register_initializer(value)
        if (self.model.ir_version or 0) < 4:
            graph.inputs.append(value)  # IR versions before 4 want every initializer among the inputs
        return value

    def insert(
        self,
        before: onnx_ir.Node,
        op_type: str,
        inputs: Sequence[onnx_ir.Value | None],
        base: str,
        attributes: Sequence[onnx_ir.Attr] = (),
    ) -> onnx_ir.Value:
        """Add a node of one result, named after ``base``, in front of another; gives the result."""
        name = self.unique(base)
        node = onnx_ir.Node("", op_type, inputs, attributes, name=name)
        node.outputs[0].name = name
        if (self.model.ir_version or 0) >= 10:
            node.metadata_props["regauge.for"] = before.name or before.outputs[0].name or ""
        assert before.graph is not None
        before.graph.insert_before(before, node)
        return node.outputs[0]

    def insert_constant(self, before: onnx_ir.Node, array: np.ndarray, base: str) -> onnx_ir.Value:
        """A Constant node: allowed in every scope and every IR version, where an initializer is not."""
        tensor = onnx_ir.Tensor(array)
        value = self.insert(before, "Constant", [], base, [onnx_ir.AttrTensor("value", tensor)])
        value.dtype = tensor.dtype
        value.shape = onnx_ir.Shape(array.shape)
        return value

    def drop_unused(self, values: Iterable[onnx_ir.Value | None]) -> None:
        """Remove what only served the given values, now that nothing reads them: nodes, then what those read."""
        stack = [value for value in values if value is not None]
        while stack:
            value = stack.pop()
            if value.uses() or value.is_graph_output() or value.is_graph_input():
                continue
            producer = value.producer()
            if producer is None:
                if value.is_initializer() and value.graph is not None:
                    value.graph.initializers.pop(value.name)  # type: ignore[arg-type]
                continue
            if producer.graph is None or any(o.uses() or o.is_graph_output() for o in producer.outputs):
                continue
            stack.extend(v for v in producer.inputs if v is not None)
            producer.graph.remove(producer, safe=True)


def _clone(model: onnx_ir.Model) -> onnx_ir.Model:
    """A copy that shares tensors; by way of a proto where onnx_ir cannot clone (nodes that are not in order)."""
    try:
        return model.clone()
    except (RuntimeError, ValueError):
        copied = onnx_ir.from_proto(onnx_ir.to_proto(model))
    for mine, theirs in zip(tensor_slots(copied), tensor_slots(model), strict=True):
        mine.put(theirs.tensor)
    return copied


def subgraphs(attribute: onnx_ir.Attr) -> Sequence[onnx_ir.Graph]:
    """The graphs an attribute holds: the bodies of If, Loop and Scan."""
    if attribute.is_ref():
        return ()
    if attribute.type == onnx_ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == onnx_ir.AttributeType.GRAPHS else ()


def _names(graph: onnx_ir.Graph) -> Iterator[str]:
    for value in [*graph.inputs, *graph.initializers.values()]:
        yield value.name or ""
    for node in graph:
        yield node.name or ""
        for value in node.outputs:
            yield value.name or ""
