"""Opening ONNX models: everything that can be wrong with a file is found here and said in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from regauge.frontends.onnx_model.reading import Arrays, put_arrays, read_proto
from regauge.frontends.onnx_model.weights import tensors_of
from regauge.ir.errors import LoadError, first_line

# In the meta of a model: protos that are written as they are, and names of values that have a type of their own.
TRAINING_INFO = "training_info"
DECLARED = "declared"
ANNOTATED = "annotated"  # False where no quantization annotation names an initializer

_NESTING = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)


def open_model(source: Any) -> tuple[onnx_ir.Model, str, list[str]]:
    """The model behind a path, an onnx.ModelProto or an onnx_ir.Model, checked; what messages call it; notes on it.

    External data is not read. Raises LoadError for a missing or truncated file, missing external data, a path that
    leaves the folder, an unknown element type, duplicate names, undefined values and cycles.
    """
    notes: list[str] = []
    if isinstance(source, onnx_ir.Model):
        model, label = source, source.graph.name or "the model"
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        label = str(path)
        proto, arrays = _read_proto(path)
        notes = _densify(proto.graph, label)
        model = _deserialize(proto, label)
        put_arrays(model, proto, arrays)
    elif hasattr(source, "graph") and hasattr(source, "opset_import"):
        label = source.graph.name or "the model"
        notes = []
        if _has_sparse(source.graph):
            copied = type(source)()
            copied.CopyFrom(source)
            source = copied
            notes = _densify(source.graph, label)
        _check_proto(source, label)
        model = _deserialize(source, label)
    else:
        raise LoadError(f"cannot load a {type(source).__name__}: give a path, an onnx.ModelProto or an onnx_ir.Model")
    folder = Path(source).parent if isinstance(source, str | os.PathLike) else None
    _check_external(_external_tensors(model), folder, label)
    check_names(model.graph, label, set())
    return model, label, notes


def lists_every_weight(model: onnx_ir.Model) -> bool:
    """Whether it is of an exporter that listed every weight among the inputs."""
    weights = model.graph.initializers.values()
    listed = sum(value.is_graph_input() for value in weights)
    version = model.ir_version or 0
    return version < 4 or (version < 7 and listed > 0 and listed >= 0.9 * len(weights))


def _read_proto(path: Path) -> tuple[Any, Arrays]:
    if not path.exists():
        raise LoadError(f"{path}: no such file; give the path of an ONNX model")
    if path.is_dir():
        raise LoadError(f"{path}: is a folder; give the path of the .onnx file in it")
    if path.suffix.lower() == ".pt2":
        raise LoadError(f"{path}: a program of torch.export; write regauge.capture(torch.export.load({str(path)!r}))")
    try:
        proto, arrays = read_proto(path)
    except Exception as error:
        raise LoadError(
            f"{path}: truncated or not an ONNX model ({_line(error)}); export or download it again"
        ) from error
    _check_proto(proto, str(path))
    return proto, arrays


def _check_proto(proto: Any, label: str) -> None:
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise LoadError(f"{label}: truncated or not an ONNX model (it has no graph); export or download it again")
    if not proto.ir_version or not proto.opset_import:
        raise LoadError(f"{label}: no IR version or opset is stated: truncated or not an ONNX model; export it again")
    _check_types(proto.graph, label)


def _graphs(graph: Any) -> Iterator[Any]:
    """A GraphProto and the ones nested in its nodes' attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
            for inner in attribute.graphs:
                yield from _graphs(inner)


def _check_types(graph: Any, label: str) -> None:
    known = {int(t) for t in onnx_ir.DataType}
    for inner in _graphs(graph):
        _check_duplicates(inner, label)
        for tensor in inner.initializer:
            if tensor.data_type not in known or not tensor.data_type:
                raise LoadError(
                    f"{label}: initializer {tensor.name!r} has the unknown element type {tensor.data_type}; "
                    f"update onnx_ir, or convert the tensor"
                )
        for value in (*inner.input, *inner.output, *inner.value_info):
            if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type not in known:
                raise LoadError(
                    f"{label}: value {value.name!r} has the unknown element type {value.type.tensor_type.elem_type}; "
                    f"update onnx_ir, or convert the value"
                )


def _check_duplicates(graph: Any, label: str) -> None:
    """onnx_ir keeps only the last of two initializers of one name, so this is asked of the file itself."""
    for names in (
        [tensor.name for tensor in graph.initializer],
        [value.name for value in graph.input] + [name for node in graph.node for name in node.output if name],
    ):
        seen: set[str] = set()
        for name in names:
            _define(name, seen, label)


def _has_sparse(graph: Any) -> bool:
    return any(inner.sparse_initializer for inner in _graphs(graph))


def _densify(graph: Any, label: str) -> list[str]:
    """Sparse initializers as dense ones (onnx_ir would drop them without a word); returns a note for each."""
    import onnx
    from onnx import numpy_helper

    notes = []
    for inner in _graphs(graph):
        for sparse in inner.sparse_initializer:
            name = sparse.values.name
            if onnx.external_data_helper.uses_external_data(sparse.values):
                raise LoadError(f"{label}: sparse initializer {name!r} is external data; store it densely")
            dense = np.zeros(tuple(sparse.dims), dtype=numpy_helper.to_array(sparse.values).dtype)
            indices = numpy_helper.to_array(sparse.indices)
            flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), dense.shape)
            dense.reshape(-1)[flat] = numpy_helper.to_array(sparse.values)
            inner.initializer.append(numpy_helper.from_array(dense, name))
            notes.append(f"sparse initializer {name!r} is held and written densely")
        del inner.sparse_initializer[:]
    return notes


def _deserialize(proto: Any, label: str) -> onnx_ir.Model:
    """The model, with what onnx_ir does not hold in ``meta``."""
    try:
        model: onnx_ir.Model = onnx_ir.from_proto(proto)
        model.meta[TRAINING_INFO] = tuple(proto.training_info)
        graphs = list(_graphs(proto.graph))
        model.meta[DECLARED] = {info.name for graph in graphs for info in graph.value_info}
        model.meta[ANNOTATED] = bool(proto.functions) or any(g.quantization_annotation for g in graphs)
        return model
    except Exception as error:
        raise LoadError(f"{label}: not a valid ONNX model ({_line(error)}); check it with onnx.checker") from error


def _external_tensors(model: onnx_ir.Model) -> list[onnx_ir.ExternalTensor]:
    owners: list[onnx_ir.Graph | onnx_ir.Function] = [model.graph, *model.functions.values()]
    found = (tensor for owner in owners for tensor in tensors_of(owner))
    return [tensor for tensor in found if isinstance(tensor, onnx_ir.ExternalTensor)]


def _check_external(external: Sequence[onnx_ir.ExternalTensor], folder: Path | None, label: str) -> None:
    """Whether data files are there, safe and long enough; ``folder`` is where the model was read from, if from one."""
    for tensor in external:
        if folder is not None:
            tensor.base_dir = str(folder)
        folder = Path(tensor.base_dir or ".").resolve()
        path = (folder / tensor.location).resolve()
        if os.path.isabs(tensor.location) or not path.is_relative_to(folder):
            raise LoadError(
                f"{label}: external data of {tensor.name!r} lies outside the model's folder ({tensor.location}); "
                f"move the file beside the model and store a relative path"
            )
        if not path.is_file():
            raise LoadError(f"{label}: external data file {tensor.location} is missing; put it beside the model")
        end = (tensor.offset or 0) + tensor.nbytes
        if tensor.length is not None and tensor.length < tensor.nbytes or path.stat().st_size < end:
            raise LoadError(
                f"{label}: external data file {tensor.location} is too short for {tensor.name!r}; copy it again"
            )


def check_names(graph: onnx_ir.Graph, label: str, outer: set[str]) -> None:
    """Every value has one definition, and no value is read that nothing defines; raises LoadError."""
    defined: set[str] = set()
    for value in graph.inputs:
        _define(value.name, defined, label)
    for value in graph.initializers.values():
        if not value.is_graph_input():
            _define(value.name, defined, label)
    for node in graph:
        for value in node.outputs:
            if value.name:
                _define(value.name, defined, label)
    visible = outer | defined
    for node in graph:
        for operand in node.inputs:
            if operand is not None and operand.name not in visible:
                raise LoadError(
                    f"{label}: node {node.name or node.op_type!r} reads {operand.name!r}, which nothing defines; "
                    f"check the model with onnx.checker"
                )
        for attribute in node.attributes.values():
            if not attribute.is_ref() and attribute.type == onnx_ir.AttributeType.GRAPH:
                check_names(attribute.value, label, visible)
    for value in graph.outputs:
        if value.name not in visible:
            raise LoadError(f"{label}: graph output {value.name!r} is produced by nothing; check it with onnx.checker")


def _define(name: str | None, defined: set[str], label: str) -> None:
    if name in defined:
        raise LoadError(f"{label}: two values are called {name!r}; make the names unique and export again")
    if name is not None:
        defined.add(name)


def in_order(graph: onnx_ir.Graph | onnx_ir.Function, label: str) -> list[onnx_ir.Node]:
    """Nodes so that each follows what it reads (captures of nested graphs too); raises LoadError on a cycle."""
    nodes = list(graph)
    place = {node: index for index, node in enumerate(nodes)}
    needs = [{place[p] for p in _producers(node) if p in place} for node in nodes]
    if all(max(need, default=-1) < index for index, need in enumerate(needs)):
        return nodes
    readers: dict[int, list[int]] = {}
    for index, need in enumerate(needs):
        for producer in need:
            readers.setdefault(producer, []).append(index)
    left = [len(need) for need in needs]
    ready = [index for index, count in enumerate(left) if not count][::-1]
    order = []
    while ready:
        index = ready.pop()
        order.append(nodes[index])
        for reader in readers.get(index, ()):
            left[reader] -= 1
            if not left[reader]:
                ready.append(reader)
    if len(order) < len(nodes):
        stuck = next(node for node, count in zip(nodes, left, strict=True) if count)
        name = stuck.name or stuck.op_type
        raise LoadError(f"{label}: the graph has a cycle through node {name!r}; an ONNX graph must not have one")
    return order


def _producers(node: onnx_ir.Node) -> Iterator[onnx_ir.Node]:
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None:
            yield producer
    for value in captured_values(node):
        producer = value.producer()
        if producer is not None:
            yield producer


def captured_values(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """Outer values that the graphs in a node's attributes read, each once, in order of use."""
    found: dict[onnx_ir.Value, None] = {}
    for graph in nested_graphs(node):
        _collect(graph, set(), found)
    return list(found)


def nested_graphs(node: onnx_ir.Node) -> Iterator[onnx_ir.Graph]:
    """The graphs in a node's attributes: branches and bodies, not what is nested in these."""
    for attribute in node.attributes.data.values():
        if attribute.type not in _NESTING or attribute.is_ref():
            continue
        yield from [attribute.value] if attribute.type == onnx_ir.AttributeType.GRAPH else attribute.value


def _collect(graph: onnx_ir.Graph, local: set[onnx_ir.Value], found: dict[onnx_ir.Value, None]) -> None:
    local = local | set(graph.inputs) | set(graph.initializers.values())
    for node in graph:
        local.update(node.outputs)
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in local:
                found.setdefault(value)
        for attribute in node.attributes.values():
            if not attribute.is_ref() and attribute.type == onnx_ir.AttributeType.GRAPH:
                _collect(attribute.value, local, found)
    for value in graph.outputs:
        if value not in local:
            found.setdefault(value)


def _line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
