"""Nodes that passes added, removed or connected differently, in the carried ONNX model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir
import sympy
import torch

from regauge.backends.onnx_carrier import Carrier
from regauge.backends.onnx_changes import Changes, Rewired
from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value
from regauge.ir.operator import OnnxForm

# Operators whose ONNX reader is more than a renaming, but whose way back is one: their ONNX names, and the names of
# their attributes there. An attribute that is not listed must have its default value.
_RENAMED: dict[str, tuple[str, dict[str, str]]] = {
    "add": ("Add", {}), "sub": ("Sub", {}), "mul": ("Mul", {}), "div": ("Div", {}), "matmul": ("MatMul", {}),
    "permute": ("Transpose", {"dims": "perm"}), "concat": ("Concat", {"dim": "axis"}),
    "cast": ("Cast", {"dtype": "to"}),
}  # fmt: skip


def rewire(graph: Graph, changes: Changes, carrier: Carrier) -> None:
    """Add, connect and remove ONNX nodes; raises EmitError for what has no ONNX spelling."""
    if not (changes.added or changes.removed or changes.rewired):
        return
    writer = _Rewiring(graph, carrier)
    place = {node: index for index, node in enumerate(graph.nodes)}
    for node in sorted(changes.added, key=lambda n: place.get(n, -1)):
        if node not in place:
            raise EmitError(f"{node.label}, added to a nested graph by {_who(node)}, cannot be written to ONNX yet")
        writer.add(node)
    for edge in changes.rewired:
        writer.connect(edge)
    writer.remove(changes.removed)
    if changes.added or changes.rewired:
        carrier.model.graph.sort()


class _Rewiring:
    def __init__(self, graph: Graph, carrier: Carrier) -> None:
        self.graph = graph
        self.carrier = carrier
        self.created: dict[Value, onnx_ir.Value] = {}

    def add(self, node: Node) -> None:
        op_type, names = _spelling(node)
        attributes = [
            onnx_ir.convenience.convert_attribute(names[key], _attribute(node, key, value))
            for key, value in node.attributes.items()
            if value is not None and value != node.operator.attributes[key]
        ]
        inputs = [self.operand(node, operand) for operand in node.inputs]
        name = self.carrier.unique(node.name)
        made = onnx_ir.Node("", op_type, inputs, attributes, name=name, num_outputs=len(node.outputs))
        for value, output in zip(node.outputs, made.outputs, strict=True):
            output.name = name if len(node.outputs) == 1 else self.carrier.unique(value.name)
            self.created[value] = output
        by = node.metadata.get("regauge.added_by")
        if by and (self.carrier.model.ir_version or 0) >= 10:
            made.metadata_props["regauge.added_by"] = by
        self.carrier.model.graph.append(made)

    def operand(self, node: Node, operand: Operand) -> onnx_ir.Value | None:
        """The ONNX value for an operand of an added node."""
        if operand is None:
            return None
        if isinstance(operand, sympy.Basic):
            raise EmitError(f"{node.label} reads the dynamic size {operand}: that cannot be written to ONNX yet")
        if not isinstance(operand, Value):
            dtype = next((v.dtype for _, v in node.operands()), node.outputs[0].dtype)
            return self._initializer(f"{node.name}_number", onnx_ir.tensor(torch.tensor(operand, dtype=dtype)))  # type: ignore[arg-type]
        found = self.created.get(operand) or self.carrier.copy_of(operand.origin)
        if found is None and isinstance(operand, Parameter):
            found = self._initializer(operand.name, onnx_ir.tensor(operand.tensor))
            self.created[operand] = found
        if found is None:
            raise EmitError(f"{node.label} reads {operand.name}, which is inside an ONNX node: that cannot be written")
        return found

    def _initializer(self, name: str, tensor: Any) -> onnx_ir.Value:
        value = onnx_ir.Value(
            name=self.carrier.unique(name),
            shape=onnx_ir.Shape(tensor.shape),
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph = self.carrier.model.graph
        graph.register_initializer(value)
        if (self.carrier.model.ir_version or 0) < 4:
            graph.inputs.append(value)  # IR versions before 4 want every initializer among the inputs
        return value

    def connect(self, edge: Rewired) -> None:
        if edge.node is None:
            self._connect_output(edge)
            return
        node = edge.node
        target = self.carrier.nodes.get(node.origin)
        before = self.carrier.copy_of(edge.before.origin) if isinstance(edge.before, Value) else None
        slots = [] if target is None or before is None else [i for i, v in enumerate(target.inputs) if v is before]
        if target is None or not slots:
            raise EmitError(
                f"{node.label}: operand {edge.slot} was replaced inside an ONNX node: that cannot be written"
            )
        after = self.operand(node, edge.after)
        for index in slots:
            target.replace_input_with(index, after)
        self.carrier.drop_unused([before])

    def _connect_output(self, edge: Rewired) -> None:
        """The output keeps its declaration: an Identity gives it the new value."""
        outputs = self.carrier.model.graph.outputs
        if edge.graph is not self.graph or not isinstance(edge.after, Value):
            raise EmitError(f"output {edge.slot} of a nested graph was replaced: it cannot be written to ONNX yet")
        source = self.created.get(edge.after) or self.carrier.copy_of(edge.after.origin)
        if source is None:
            raise EmitError(f"output {edge.slot} is {edge.after.name}, inside an ONNX node: that cannot be written")
        declared = outputs[edge.slot]
        name = declared.name or f"output_{edge.slot}"
        declared.name = self.carrier.unique(f"{name}_before")
        node = onnx_ir.Node("", "Identity", [source], name=self.carrier.unique(f"{name}_identity"))
        made = node.outputs[0]
        made.name, made.type, made.shape, made.doc_string = name, declared.type, declared.shape, declared.doc_string
        self.carrier.model.graph.append(node)
        outputs[edge.slot] = made
        self.carrier.drop_unused([declared])

    def remove(self, removed: Sequence[Node]) -> None:
        """Drop ONNX nodes all of whose counterparts are gone; one that is gone in part cannot be written."""
        kept = {node.origin for _, node in self.graph.walk()}
        for node in removed:
            if node.origin is None:
                continue
            if node.origin in kept:
                raise EmitError(f"{node.label} was removed from inside an ONNX node: it cannot be written to ONNX")
            self.carrier.drop_unused([self.carrier.copy_of(output) for output in node.origin.outputs])


def _spelling(node: Node) -> tuple[str, dict[str, str]]:
    """The ONNX operator an added node is written as, and its attributes' names there."""
    if node.regions:
        raise EmitError(f"{node.label}, added by {_who(node)}, has nested graphs: it cannot be written to ONNX yet")
    set_here = [key for key, value in node.attributes.items() if value != node.operator.attributes[key]]
    same_names = {key: key for key in node.attributes}
    direct = [name for name, form in node.operator.onnx.items() if _is_direct(form) and "::" not in name]
    for op_type, names in [_RENAMED[node.op]] if node.op in _RENAMED else [(name, same_names) for name in direct]:
        if all(key in names for key in set_here):
            return op_type, names
    raise EmitError(f"{node.label}, added by {_who(node)}, cannot be written to ONNX yet: leave that pass out")


def _is_direct(form: Any) -> bool:
    """Whether an ONNX operator is read as it stands: inputs are the operands, attributes have the same names."""
    return form is None or isinstance(form, OnnxForm) and form.read is None


def _who(node: Node) -> str:
    return node.metadata.get("regauge.added_by") or "a pass"


def _attribute(node: Node, name: str, value: Any) -> Any:
    if isinstance(value, sympy.Basic) or isinstance(value, tuple) and any(isinstance(v, sympy.Basic) for v in value):
        raise EmitError(f"{node.label}: its {name} has a dynamic size and cannot be written to ONNX yet")
    if isinstance(value, torch.dtype):
        return int(onnx_ir.tensor_adapters.from_torch_dtype(value))
    return value
