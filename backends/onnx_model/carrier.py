"""A clone of the ONNX model a graph was loaded from, and the way from each original part to its copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir

from regauge.backends.onnx_model.write import all_graphs, graphs_in, tensor_slots, with_nested


class Carrier:
    """The clone and its maps. Whatever is not changed through it is serialised as it was.

    ``nodes`` and ``values`` lead from the parts of the original model, which the IR holds as origins, to the copies.
    """

    def __init__(self, model: onnx_ir.Model, inputs: Iterable[Any] = ()) -> None:
        """``inputs`` are the original values that are inputs: other initializers among them are weights."""
        self.model = _clone(model)
        self.nodes: dict[onnx_ir.Node, onnx_ir.Node] = {}
        self.values: dict[onnx_ir.Value, onnx_ir.Value] = {}
        self._match(model.graph, self.model.graph)
        for key, function in model.functions.items():
            self._match(function.graph, self.model.functions[key].graph)
        self._origins: dict[onnx_ir.Value, list[onnx_ir.Value]] = {}
        for origin, copied in self.values.items():
            self._origins.setdefault(copied, []).append(origin)
        self.function_graphs = {g for f in self.model.functions.values() for g in with_nested(f.graph)}
        self._names = Counter(name for graph in all_graphs(self.model) for name in _names(graph))
        self.inputs = {self.values[origin] for origin in inputs if origin in self.values}
        self.referenced = _referenced(self.model)
        self.edits = 0  # how often anything but a weight was changed

    def _match(self, old: onnx_ir.Graph, new: onnx_ir.Graph) -> None:
        self.values.update(zip(old.inputs, new.inputs, strict=True))
        self.values.update(zip(old.initializers.values(), new.initializers.values(), strict=True))
        for node, copied in zip(old, new, strict=True):
            self.nodes[node] = copied
            self.values.update(zip(node.outputs, copied.outputs, strict=True))
            for inner, inner_copy in zip(graphs_in(node), graphs_in(copied), strict=True):
                self._match(inner, inner_copy)

    def copy_of(self, origin: Any) -> onnx_ir.Value | None:
        """The copy of an original value; None for a value that is no part of the model (any more)."""
        return self.values.get(origin)

    def unique(self, base: str) -> str:
        """A name that no node or value of the model has, in any scope, derived from ``base``."""
        candidate, number = base, 0
        while self._names[candidate] > 0:
            number += 1
            candidate = f"{base}_{number}"
        self._names[candidate] += 1
        return candidate

    def make_unique(self, value: onnx_ir.Value) -> None:
        """Rename a value that moved to an outer scope, if another scope has its name too."""
        if not value.name or self._names[value.name] < 2:
            return
        self._names[value.name] -= 1
        new, tensor = self.unique(value.name), value.const_value
        value.const_value = None  # the tensor is shared with the original, whose name it has
        value.name = new
        value.const_value = tensor

    def take_name(self, value: onnx_ir.Value, other: onnx_ir.Value) -> None:
        """Give a new value the name of one that nothing reads any more."""
        name, spare = other.name, value.name
        if name and spare and not other.uses() and not other.is_graph_output() and other.const_value is None:
            other.name, value.name = spare, name

    def forget(self, graph: onnx_ir.Graph) -> None:
        """A nested graph will never run: it reads nothing any more, and its names are free."""
        for inner in with_nested(graph):
            self._names.subtract(_names(inner))
            for node in inner:
                for index in range(len(node.inputs)):
                    node.replace_input_with(index, None)

    def is_input(self, value: onnx_ir.Value) -> bool:
        """Whether whoever runs the model may give this value; not so a weight that old exporters listed as an input."""
        return value.is_graph_input() and (value in self.inputs or not value.is_initializer())

    def unlist_weights(self) -> None:
        """Weights that are listed as inputs, though nobody gives them, become constants: runtimes fold only those.

        IR versions before 4 want every initializer listed, and their runtimes know that these are constants.
        """
        if (self.model.ir_version or 0) < 4:
            return
        inputs = self.model.graph.inputs
        kept = [v for v in inputs if self.is_input(v) or v.name in self.referenced]
        if len(kept) < len(inputs):
            self.edits += len(inputs) - len(kept)
            inputs.clear()
            inputs.extend(kept)

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
        self.edits += 1
        self.model.graph.register_initializer(value)
        if (self.model.ir_version or 0) < 4:
            self.model.graph.inputs.append(value)  # IR versions before 4 want every initializer among the inputs
        return value

    def as_initializer(self, value: onnx_ir.Value, tensor: Any) -> onnx_ir.Value:
        """An initializer of the main graph that takes the place, and if no other scope has it, the name of a value."""
        name = value.name or "constant"
        value.name, tensor_name = self.unique(f"{name}_before"), tensor.name
        self._names[name] -= 1
        made = self.add_initializer(name, tensor)
        tensor.name = tensor_name  # it is shared with the original
        self.supersede(value, made)
        return made

    def stand_in(self, value: onnx_ir.Value, other: onnx_ir.Value) -> None:
        """From now on another value is the copy of what a value was the copy of."""
        for origin in self._origins.pop(value, ()):
            self.values[origin] = other
            self._origins.setdefault(other, []).append(origin)

    def supersede(self, value: onnx_ir.Value, other: onnx_ir.Value) -> None:
        """Let whatever reads a constant read another one, and drop it."""
        self.redirect(value, other)
        self.stand_in(value, other)
        self.drop_unused([value])

    def move_initializer(self, value: onnx_ir.Value, place: onnx_ir.Graph) -> None:
        """Let an initializer of a nested graph belong to a graph around it."""
        assert value.graph is not None and value.name is not None
        value.graph.initializers.pop(value.name)
        self.make_unique(value)
        place.register_initializer(value)

    def give_output(self, place: onnx_ir.Graph, slot: int, source: onnx_ir.Value, *, rename: bool) -> onnx_ir.Value:
        """Let a graph output be ``source`` and keep its declaration; returns the value that is the output now.

        With ``rename`` the source takes over the name of the output where it can, else an Identity makes a copy.
        """
        declared = place.outputs[slot]
        name = declared.name or f"output_{slot}"
        declared.name = self.unique(f"{name}_before")
        made = source
        if not rename or source.producer() is None or source.is_graph_output() or source.graph is not place:
            node = onnx_ir.Node("", "Identity", [source], name=self.unique(f"{name}_identity"))
            place.append(node)
            made = node.outputs[0]
        made.name, made.type, made.shape, made.doc_string = name, declared.type, declared.shape, declared.doc_string
        place.outputs[slot] = made
        self.edits += 1
        return made

    def remove(self, node: onnx_ir.Node) -> list[onnx_ir.Value]:
        """Take a node out of its graph; returns what it and the graphs nested in it read."""
        read = [value for value in node.inputs if value is not None]
        for nested in graphs_in(node):
            read += [v for inner in with_nested(nested) for n in inner for v in n.inputs if v is not None]
            self.forget(nested)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        self.edits += 1
        return read

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
        self.edits += 1
        return node.outputs[0]

    def insert_constant(
        self, before: onnx_ir.Node, array: np.ndarray, base: str, instead: onnx_ir.Value | None = None
    ) -> onnx_ir.Value:
        """A Constant node: allowed in every scope and every IR version. ``instead`` of an initializer another one."""
        tensor = onnx_ir.Tensor(array)
        if instead is not None and instead.producer() is None and instead.is_initializer():
            return self.add_initializer(base, tensor)
        value = self.insert(before, "Constant", [], base, [onnx_ir.AttrTensor("value", tensor)])
        value.dtype = tensor.dtype
        value.shape = onnx_ir.Shape(array.shape)
        return value

    def redirect(self, value: onnx_ir.Value, other: onnx_ir.Value) -> None:
        """Let every node that reads a value read another one."""
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, other)
            self.edits += 1

    def drop_unused(self, values: Iterable[onnx_ir.Value | None]) -> None:
        """Remove what only served the given values, now that nothing reads them: nodes, then what those read."""
        stack = [value for value in values if value is not None]
        while stack:
            value = stack.pop()
            if value.uses() or value.is_graph_output() or self.is_input(value):
                continue
            producer = value.producer()
            if producer is None:
                self.drop_initializer(value)
                continue
            if producer.graph is None or any(o.uses() or o.is_graph_output() for o in producer.outputs):
                continue
            stack.extend(self.remove(producer))

    def drop_initializer(self, value: onnx_ir.Value) -> None:
        """Remove an initializer that nothing reads; one that is listed as an input goes from there too."""
        graph = value.graph
        if graph is None or value.name is None or value.name not in graph.initializers or value.name in self.referenced:
            return
        graph.initializers.pop(value.name)
        if value.is_graph_input():
            graph.inputs.remove(value)
        self.edits += 1


def _clone(model: onnx_ir.Model) -> onnx_ir.Model:
    """A copy that shares tensors; by way of a proto where onnx_ir cannot clone (nodes that are not in order)."""
    try:
        copied = model.clone()
    except (RuntimeError, ValueError):
        copied = onnx_ir.from_proto(onnx_ir.to_proto(model))
        for mine, theirs in zip(tensor_slots(copied), tensor_slots(model), strict=True):
            mine.put(theirs.tensor)
    copied.meta.update(model.meta)
    return copied


def _referenced(model: onnx_ir.Model) -> set[str]:
    """Names of initializers that quantization annotations and training information refer to."""
    found: set[str] = set()
    for graph in all_graphs(model) if model.meta.get("annotated", True) else ():
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        for value in values:
            found.update(value.meta.get("quant_parameter_tensor_names", {}).values())
    for training in model.meta.get("training_info", ()):
        for inner in (training.initialization, training.algorithm):
            found.update(name for node in inner.node for name in node.input)
        found.update(entry.key for entry in (*training.initialization_binding, *training.update_binding))
    return found


def _names(graph: onnx_ir.Graph) -> Iterator[str]:
    for value in [*graph.inputs, *graph.initializers.values()]:
        yield value.name or ""
    for node in graph:
        yield node.name or ""
        for value in node.outputs:
            yield value.name or ""
