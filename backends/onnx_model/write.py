"""Writing ONNX files, with external data laid out as the source had it.

A model and its data files appear together or not at all. Tensors are read one at a time while they are written, so that
memory never holds more than the largest of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import onnx_ir

from regauge.backends.onnx_model.sparse import store_sparsely
from regauge.backends.onnx_model.streaming import hollow_initializers, write_proto
from regauge.backends.staged_files import Staging, check_location
from regauge.ir.collection import without_collection
from regauge.ir.errors import EmitError

MOST_INLINE_BYTES = 1_800_000_000  # protobuf ends at 2 GiB; the graph itself needs room too
LEAST_EXTERNAL_BYTES = 1024  # smaller tensors stay in the model file, as onnx and torch do

Check = Callable[[Path], None]

_STANDARD = ("", "ai.onnx", "ai.onnx.ml")  # domains whose results shape inference tells
_NESTING = (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)


@dataclass
class TensorSlot:
    """A place of a model that holds a tensor: an initializer or a tensor attribute of a node."""

    tensor: Any  # an onnx_ir tensor
    put: Callable[[Any], None]
    initializer: bool


def all_graphs(model: onnx_ir.Model) -> Iterator[onnx_ir.Graph]:
    """The graph of a model, the bodies of its functions, and every graph nested in them."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from with_nested(graph)


def with_nested(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Graph]:
    """A graph, and every graph nested in it."""
    yield graph
    for node in graph:
        for inner in graphs_in(node):
            yield from with_nested(inner)


def graphs_in(node: onnx_ir.Node) -> list[onnx_ir.Graph]:
    """The graphs that attributes of a node hold, in their order."""
    attributes = node.attributes.data.values()  # a view of what wraps this dictionary is many times slower
    return [graph for attribute in attributes if attribute.type in _NESTING for graph in subgraphs(attribute)]


def subgraphs(attribute: onnx_ir.Attr) -> Sequence[onnx_ir.Graph]:
    """The graphs an attribute holds: the bodies of If, Loop and Scan."""
    if attribute.is_ref():
        return ()
    if attribute.type == onnx_ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == onnx_ir.AttributeType.GRAPHS else ()


def tensor_slots(model: onnx_ir.Model) -> Iterator[TensorSlot]:
    """Every tensor of a model, those of nested graphs and of functions included, in file order."""
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield TensorSlot(value.const_value, _initializer_setter(value), initializer=True)
        for node in graph:
            for name, attribute in node.attributes.items():
                if not attribute.is_ref() and attribute.type == onnx_ir.AttributeType.TENSOR:
                    yield TensorSlot(attribute.value, _attribute_setter(node, name), initializer=False)


def _initializer_setter(value: onnx_ir.Value) -> Callable[[Any], None]:
    def put(tensor: Any) -> None:
        value.const_value = tensor

    return put


def _attribute_setter(node: onnx_ir.Node, name: str) -> Callable[[Any], None]:
    def put(tensor: Any) -> None:
        node.attributes[name] = onnx_ir.AttrTensor(name, tensor, node.attributes[name].doc_string)

    return put


def external_locations(model: onnx_ir.Model) -> list[str]:
    """Data files a model refers to, relative to its folder, each once."""
    found = (slot.tensor.location for slot in tensor_slots(model) if isinstance(slot.tensor, onnx_ir.ExternalTensor))
    return list(dict.fromkeys(os.fspath(location) for location in found))


def copy_model(source: Path, target: Path, locations: Sequence[str], *, overwrite: bool = True) -> None:
    """Copy a model file byte by byte, and its data files when it goes to another folder."""
    with Staging(target, overwrite) as staging:
        if target.exists() and os.path.samefile(source, target):
            return
        shutil.copyfile(source, staging.main)
        if not os.path.samefile(source.parent, target.parent):
            for location in locations:
                shutil.copyfile(source.parent / location, staging.place(location))
        staging.publish()


def write_model(
    model: onnx_ir.Model,
    target: Path,
    *,
    external_data: bool | str | None = None,
    overwrite: bool = True,
    checks: Sequence[Check] = (),
    sparse_weights: bool = False,
) -> None:
    """Write ``model``; its tensors become the written ones. ``checks`` see the finished file before it is published.

    ``external_data``: None keeps each tensor where it was (in the file or beside it), True or a file name puts all but
    small ones beside it, False puts all into the file. More than 1.8 GB never go into one file. ``sparse_weights`` lets
    weights in the file be sparse where that is smaller.
    """
    with Staging(target, overwrite) as staging:
        plan = _plan(model, target, external_data)
        for location, slots in plan.items():
            _write_data(slots, staging, location)
        _serialize(model, staging.main, sparse_weights)
        for check in checks:
            check(staging.main)
        staging.publish()


def _plan(model: onnx_ir.Model, target: Path, external_data: bool | str | None) -> Mapping[str, list[TensorSlot]]:
    """Which tensors go to which data file, in the order they had in the source; loads those that go inside."""
    slots = list(tensor_slots(model))
    inline = sum(s.tensor.nbytes for s in slots if external_data is False or source_location(s.tensor) is None)
    taken = {os.path.realpath(external.path) for s in slots if (external := _external(s.tensor)) is not None}
    if isinstance(external_data, str):
        check_location(external_data)
        if os.path.normpath(external_data) == target.name:
            raise EmitError(
                f"external data cannot be in {external_data!r}: that is the model itself, take another name"
            )
        if os.path.realpath(target.parent / external_data) in taken:
            raise EmitError(
                f"external data cannot be in {external_data!r}: the graph still reads its weights from there"
            )
    elif external_data is not True and inline > MOST_INLINE_BYTES:
        external_data = True
    names = _Names(target, taken)
    plan: dict[str, list[TensorSlot]] = {}
    for slot in sorted(slots, key=lambda s: _position(s.tensor)):
        location = _destination(slot, external_data, names)
        if location is not None:
            plan.setdefault(location, []).append(slot)
        elif isinstance(slot.tensor, onnx_ir.ExternalTensor):
            slot.put(_in_memory(slot.tensor))
    return plan


def _destination(slot: TensorSlot, external_data: bool | str | None, names: _Names) -> str | None:
    if external_data is False:
        return None
    if external_data is None:
        location = source_location(slot.tensor)
        return None if location is None else names.keeping(location)
    small = slot.tensor.nbytes < LEAST_EXTERNAL_BYTES
    if small or not slot.initializer or slot.tensor.dtype == onnx_ir.DataType.STRING:
        return None
    return external_data if isinstance(external_data, str) else names.keeping(f"{names.target.name}.data")


@dataclass
class _Names:
    """Names of data files that do not overwrite a file the graph still reads from."""

    target: Path
    taken: set[str]
    chosen: dict[str, str] = field(default_factory=dict)

    def keeping(self, location: str) -> str:
        if location not in self.chosen:
            check_location(location)
            candidate, number = location, 0
            while os.path.realpath(self.target.parent / candidate) in self.taken or candidate in self.chosen.values():
                number += 1
                name = f"{self.target.name}.data" if number == 1 else f"{self.target.name}.{number}.data"
                candidate = str(PurePosixPath(location).with_name(name))
            self.chosen[location] = candidate
        return self.chosen[location]


class ChangedTensor(onnx_ir.LazyTensor):
    """A tensor that is made while it is written; it remembers the external tensor whose place it takes."""

    __slots__ = ("source",)

    def __init__(self, *args: Any, source: onnx_ir.ExternalTensor | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.source = source


def _external(tensor: Any) -> onnx_ir.ExternalTensor | None:
    if isinstance(tensor, ChangedTensor):
        return tensor.source
    return tensor if isinstance(tensor, onnx_ir.ExternalTensor) else None


def source_location(tensor: Any) -> str | None:
    """The data file a tensor belongs to, or None for one inside the model file."""
    external = _external(tensor)
    return None if external is None else os.fspath(external.location)


def _position(tensor: Any) -> tuple[int, int]:
    external = _external(tensor)
    return (0, 0) if external is None else (1, external.offset or 0)


def _in_memory(tensor: onnx_ir.ExternalTensor) -> Any:
    """The content of an external tensor, detached from its file."""
    array = tensor.numpy().copy()
    tensor.release()
    return onnx_ir.Tensor(array, dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)


def _write_data(slots: list[TensorSlot], staging: Staging, location: str) -> None:
    """Stream tensors into one data file, aligned as they were in the source, and let the model refer to it."""
    staging.place(location)
    written = onnx_ir.external_data.convert_tensors_to_external(
        [slot.tensor for slot in slots], staging.folder, location, alignment=_alignment(slots)
    )
    for slot, tensor in zip(slots, written, strict=True):
        tensor.doc_string = slot.tensor.doc_string
        tensor.metadata_props.update(slot.tensor.metadata_props)
        slot.put(tensor)


def _alignment(slots: list[TensorSlot]) -> int | None:
    """The alignment that the large tensors of the source have, if they have one."""
    sources = [s for slot in slots if (s := _external(slot.tensor)) is not None]
    offsets = [s.offset or 0 for s in sources if s.nbytes > 1 << 20 and s.offset]
    for alignment in (65536, 4096):
        if offsets and all(offset % alignment == 0 for offset in offsets):
            # Tensors that fill whole blocks are aligned without any padding: only a gap shows that it was meant.
            return alignment if _has_gap(sources) else None
    return None


def _has_gap(sources: list[onnx_ir.ExternalTensor]) -> bool:
    ends = sorted((s.offset or 0, (s.offset or 0) + s.nbytes) for s in sources)
    return any(start > end for (_, end), (start, _) in zip(ends, ends[1:], strict=False))


def _serialize(model: onnx_ir.Model, path: Path, sparse_weights: bool) -> None:
    try:
        hollow: AbstractContextManager[dict[int, Any]] = nullcontext({})
        if not sparse_weights:
            hollow = hollow_initializers(model)
        with without_collection(), hollow as tensors:
            proto = onnx_ir.to_proto(model)
        proto.training_info.extend(model.meta.get("training_info", ()))
        _drop_declarations(proto.graph, model.meta.get("declared"))
        if sparse_weights:
            store_sparsely(proto.graph)
        write_proto(proto, tensors, path)
    except OSError:
        raise
    except Exception as error:  # protobuf raises its own types; a model past 2 GiB ends here
        raise EmitError(f"the model cannot be serialised: {error}") from error


def _drop_declarations(graph: Any, declared: Container[str] | None) -> None:
    """Leave out, unless it was there, what is said anyhow: types of initializers, and of results without a shape.

    Where the file ``declared`` no result at all, also what shape inference tells of standard operators; None: no file.
    """
    silent = {tensor.name for tensor in graph.initializer}
    if declared is not None and not declared:
        silent |= {name for node in graph.node if node.domain in _STANDARD for name in node.output}

    def says_more(info: Any) -> bool:
        bare = info.type.HasField("tensor_type") and not info.type.tensor_type.HasField("shape")
        return declared is not None and info.name in declared or not (bare or info.name in silent)

    kept = [info for info in graph.value_info if says_more(info)]
    if len(kept) < len(graph.value_info):
        del graph.value_info[:]
        graph.value_info.extend(kept)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _drop_declarations(inner, declared)
