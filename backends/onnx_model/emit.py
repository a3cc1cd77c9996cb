"""Putting the changes of a graph into a copy of the ONNX model it was loaded from; nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir
import torch

from regauge.backends.onnx_model.bits import is_packed, packed
from regauge.backends.onnx_model.carrier import Carrier
from regauge.backends.onnx_model.changes import Changes
from regauge.backends.onnx_model.contents import Contents, equal_contents, is_content
from regauge.backends.onnx_model.folding import fold_known, skip_aliases
from regauge.backends.onnx_model.inlining import inline_graphs
from regauge.backends.onnx_model.patch import FOLDED_SIZES, OnnxPatch
from regauge.backends.onnx_model.rewiring import carried_nodes, rewire
from regauge.backends.onnx_model.size_nodes import SizeSource
from regauge.backends.onnx_model.write import ChangedTensor
from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.operator import find_onnx
from regauge.ir.sizes.onnx_contents import constant_tensor


def patched_model(graph: Graph, changes: Changes) -> tuple[onnx_ir.Model, bool]:
    """The carried model with the changes in it, and if it differs from the carried one; raises EmitError naming the
    node that cannot be written."""
    carried: onnx_ir.Model = graph.metadata["onnx"]
    values, inputs = list(all_values(graph)), {value.origin for value in graph.inputs}
    carrier = Carrier(carried, inputs)
    shapes = {value.origin: value.shape for value in values if isinstance(value.origin, onnx_ir.Value) and value.ranked}
    contents = Contents(shapes, carried.opset_imports, inputs)
    inline_graphs(graph, changes.inlined, carrier)
    skip_aliases(graph, carrier)
    _check_interface(graph, changes)
    _write_weights(changes.weights, carrier)
    sources = SizeSource.of(carrier, values, graph.inputs)
    _write_sizes(graph, changes, carrier, contents, sources)
    _bypass(graph, changes, carrier)
    _freeze(graph, changes, carrier, contents)
    _freeze_branches(graph, carrier, contents)
    rewire(graph, graph.metadata["onnx_imported"], changes, carrier, sources, contents)
    fold_known(graph, carrier, contents)
    _write_shapes(graph, changes, carrier)
    return carrier.model, bool(changes or carrier.edits)


def all_values(graph: Graph) -> Iterator[Value]:
    """Values of a graph and of its regions."""
    yield from graph.values()
    for _, node in graph.walk():
        for region in node.regions:
            yield from region.values()


def _check_interface(graph: Graph, changes: Changes) -> None:
    edge = {*graph.inputs, *(o for o in graph.outputs if isinstance(o, Value))}
    for before, after in changes.shapes:
        if after in edge and not _meant(graph, after):
            change = f"{before.signature} to {after.signature}"
            raise EmitError(f"{after.name} went from {change}: the interface of an ONNX model must stay as it is")


def _meant(graph: Graph, output: Value) -> bool:
    """Whether a pass was asked to change the shape of an output."""
    return output.name in graph.metadata.get("changed_outputs", ())


def _write_weights(parameters: Iterable[Parameter], carrier: Carrier) -> None:
    """Let initializers and Constant nodes hold the changed data; it is read while the file is written."""
    for parameter in parameters:
        value = carrier.copy_of(parameter.origin)
        if value is None:
            continue  # it stands for shape arithmetic or is new: frozen or added further on
        producer = value.producer()
        before = constant_tensor(value)
        if before is None:
            continue
        if value.graph in carrier.function_graphs:
            raise EmitError(
                f"{parameter.name} is written inside a function, which cannot be cut: inline functions first"
            )
        tensor = changed_tensor(parameter, before)
        if producer is None:
            value.const_value = tensor
        else:
            _set_constant_node(producer, tensor)


def _set_constant_node(node: onnx_ir.Node, tensor: Any) -> None:
    """A Constant node keeps its form only if it is the tensor form: numbers in other forms cannot say their shape."""
    for name in list(node.attributes):
        node.attributes.pop(name)
    node.attributes["value"] = onnx_ir.AttrTensor("value", tensor)
    node.outputs[0].const_value = None


def changed_tensor(parameter: Parameter, before: Any = None) -> ChangedTensor:
    """A parameter as an ONNX tensor that reads its weight when it is written; named and laid out like ``before``, and
    of its type where that has fewer bits than a byte."""
    dtype = onnx_type(parameter)
    if before is not None and is_packed(before.dtype):
        dtype = before.dtype

    def read() -> Any:
        if is_packed(dtype):
            return packed(parameter, dtype)
        return onnx_ir.tensor_adapters.TorchTensor(parameter.weight.load().contiguous())

    return ChangedTensor(
        read,
        dtype=dtype,
        shape=onnx_ir.Shape(parameter.weight.shape),
        name=before.name if before is not None else parameter.name,
        doc_string=before.doc_string if before is not None else None,
        metadata_props=dict(before.metadata_props) if before is not None else None,
        source=before if isinstance(before, onnx_ir.ExternalTensor) else None,
    )


def onnx_type(value: Value) -> onnx_ir.DataType:
    if not isinstance(value.dtype, torch.dtype):
        raise EmitError(f"{value.name} has the type {value.dtype}: changed data of that type cannot be written")
    return onnx_ir.tensor_adapters.from_torch_dtype(value.dtype)


def _write_sizes(graph: Graph, changes: Changes, carrier: Carrier, contents: Contents, sources: SizeSource) -> None:
    """Call the writers of the ONNX nodes whose sizes are other ones now, or whose shape arithmetic now gives others."""
    restated = set(changes.restated)
    changed = {
        node.origin for node in changes.attributes if node not in restated and isinstance(node.origin, onnx_ir.Node)
    }
    reshaped = {node.origin for _, value in changes.shapes for node in _around(value)}
    changed |= {origin for origin in reshaped if isinstance(origin, onnx_ir.Node) and _stores_shape(origin)}
    present = _by_origin(graph, changes)
    fold = "constants" in graph.metadata.get("onnx_fold", ())
    if fold:
        changed |= {node for node, (_, made) in present.items() if made[0].op == FOLDED_SIZES.get(node.op_type)}
    for origin, (owner, nodes) in present.items():
        drifted = _drifted(graph, origin, nodes, contents)
        if origin not in changed and not drifted:
            continue
        if carrier.nodes[origin].graph in carrier.function_graphs:
            continue  # bodies of functions stay as they are: the check of the written file decides
        patch = OnnxPatch(carrier, origin, owner, nodes, sources, contents, fold=fold)
        if origin in changed:
            _writer(origin, nodes)(nodes, patch)
        for index, known in drifted.items():
            patch.keep_content(index, known)
        patch.finish()


def _around(value: Value) -> list[Node]:
    """The node that gives a value; those that read it, where it is a weight."""
    return value.consumers() if isinstance(value, Parameter) else [value.producer] if value.producer else []


def _stores_shape(origin: onnx_ir.Node) -> bool:
    found = find_onnx(origin.domain, origin.op_type)
    return found is not None and found[1].stores_shape


def _writer(origin: onnx_ir.Node, nodes: list[Node]) -> Any:
    found = find_onnx(origin.domain, origin.op_type)
    if found is None or found[1].write is None:
        name = origin.name or origin.outputs[0].name
        raise EmitError(
            f"{nodes[0].label}: new sizes cannot be put back into the {origin.op_type} node {name}, "
            f"the record of that operator has no OnnxForm.write: keep that axis"
        )
    return found[1].write


def _by_origin(graph: Graph, changes: Changes) -> dict[onnx_ir.Node, tuple[Graph, list[Node]]]:
    """The nodes that stand for each ONNX node, in order, with the graph or region that owns them."""
    found: dict[onnx_ir.Node, tuple[Graph, list[Node]]] = {}
    for owner, node in carried_nodes(graph, changes):
        found.setdefault(node.origin, (owner, []))[1].append(node)
    return found


def _drifted(graph: Graph, origin: onnx_ir.Node, nodes: list[Node], contents: Contents) -> dict[int, Any]:
    """Contents at import of the inputs that were folded into numbers and that the model as it is would now compute to
    something else."""
    folded = graph.metadata.get("onnx_folded", {})
    data = {operand.origin for node in nodes for _, operand in node.operands()}
    found = {}
    for index, value in enumerate(origin.inputs):
        record = folded.get(value)
        if record is not None and value not in data and not equal_contents(record.known, contents.of(value)):
            found[index] = record.known
    return found


# ONNX operators that a reader may leave out, because the sizes written in them change nothing about their input.
_MAY_DO_NOTHING = {"Expand", "Slice", "Tile", "Pad"}


def _bypass(graph: Graph, changes: Changes, carrier: Carrier) -> None:
    """Nodes that did nothing at import, and so have no counterpart, must not do anything on a cut input either."""
    resized = {after.origin for _, after in changes.shapes}
    present = {node.origin for _, node in carried_nodes(graph, changes)} | set(graph.metadata.get("onnx_folded", {}))
    for origin, copied in carrier.nodes.items():
        if origin.op_type not in _MAY_DO_NOTHING or origin in present or origin.outputs[0] in present:
            continue
        if origin.inputs[0] in resized and copied.graph not in carrier.function_graphs:
            resized.add(origin.outputs[0])
            others = copied.inputs[1:]
            copied.op_type = "Identity"
            copied.attributes.clear()
            copied.resize_inputs(1)
            carrier.drop_unused(others)


def _freeze(graph: Graph, changes: Changes, carrier: Carrier, contents: Contents) -> None:
    """Constants that were folded from shapes keep their value (or what it was cut to) where the model gives another."""
    folded = graph.metadata.get("onnx_folded", {})
    for _, node in carried_nodes(graph, changes):
        for _, operand in node.operands():
            record = folded.get(operand.origin)
            if record is None or not isinstance(operand, Parameter):
                continue
            if carrier.nodes[node.origin].graph in carrier.function_graphs:
                continue
            content = operand.tensor
            present = contents.of(operand.origin)
            if present is not None and present.static and is_content(present.array, content):
                continue
            _freeze_in(carrier.nodes[node.origin], operand, content, carrier)


def _freeze_branches(graph: Graph, carrier: Carrier, contents: Contents) -> None:
    """An If whose branch was known at import keeps taking that branch."""
    for origin, branch in graph.metadata.get("onnx_branches", {}).items():
        condition = origin.inputs[0]
        present = contents.of(condition)
        if present is not None and present.static and bool(present.array) == (branch == 0):
            continue
        if origin not in carrier.nodes:
            continue
        node = carrier.nodes[origin]
        before = node.inputs[0]
        base = f"{condition.name}_frozen"
        node.replace_input_with(
            0, carrier.insert_constant(node, np.full(() if present is None else present.array.shape, branch == 0), base)
        )
        carrier.drop_unused([before])


def _freeze_in(node: onnx_ir.Node, parameter: Parameter, content: torch.Tensor, carrier: Carrier) -> None:
    before = carrier.copy_of(parameter.origin)
    for index, value in enumerate(node.inputs):
        if value is None or value is not before:
            continue
        base = f"{before.name or parameter.name}_frozen"
        node.replace_input_with(index, carrier.insert_constant(node, content.detach().cpu().numpy(), base))
        carrier.drop_unused([before])


def _write_shapes(graph: Graph, changes: Changes, carrier: Carrier) -> None:
    """Declared shapes inside the model follow the cut, also those of what bodies and branches take and give; what
    cannot be said as a number is left open. The interface of the model itself stays, unless a pass was asked for it."""
    interface = {*carrier.model.graph.inputs, *carrier.model.graph.outputs}
    for before, after in changes.shapes:
        value = carrier.copy_of(after.origin)
        if value is None or value.shape is None:
            continue
        if value in interface and not value.is_initializer() and not _meant(graph, after):
            continue
        if value.graph in carrier.function_graphs or len(value.shape) != len(after.shape):
            value.shape = None
            continue
        dims = [
            dim if old == new else (new if isinstance(new, int) else None)
            for dim, old, new in zip(value.shape, before.shape, after.shape, strict=True)
        ]
        value.shape = onnx_ir.Shape(dims)
