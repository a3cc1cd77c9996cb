"""Reading ONNX files without a second copy of their weights.

Protobuf hands out the data of a tensor as a new copy every time. So large initializers are read from the file straight
into arrays of their own, and what is parsed is the rest of the file, which is small.
"""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx_ir

from regauge.ir.storage.protobuf_wire import delimited, fields

LEAST_BYTES = 1 << 12  # smaller tensors are parsed with all else
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # numbers of fields in onnx.proto
_PLAIN_FIELDS = {1, 2, 8, _RAW_DATA}  # dims, data_type, name, raw_data
_PLAIN_TYPES = frozenset(
    (
        "FLOAT", "DOUBLE", "FLOAT16", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"
    )
)  # fmt: skip

Arrays = dict[int, np.ndarray]


class _Unusual(Exception):
    """The file has to be parsed as a whole: it is broken, or written in a way that exporters do not write."""


def read_proto(path: Path) -> tuple[Any, Arrays]:
    """The model in a file, and by their place the data of initializers that lack it there; raises what onnx does."""
    return _read(path, with_data=True)


def read_skeleton(path: Path) -> Any:
    """The model in a file, whose large initializers lack their data; raises what onnx does."""
    return _read(path, with_data=False)[0]


def _read(path: Path, *, with_data: bool) -> tuple[Any, Arrays]:
    if path.suffix == ".onnx" and sys.byteorder == "little":
        try:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                scanner = _Scanner(file, content, with_data)
                return onnx.ModelProto.FromString(scanner.model()), scanner.arrays
        except Exception:  # whatever is wrong, onnx has words for it
            pass
    return onnx.load(str(path), load_external_data=False), {}


def put_arrays(model: onnx_ir.Model, proto: Any, arrays: Arrays) -> None:
    """Give the initializers of a model made from ``proto`` their data."""
    for place, array in arrays.items():
        tensor = proto.graph.initializer[place]
        data_type = onnx_ir.DataType(tensor.data_type)
        value = model.graph.initializers[tensor.name]
        data = array.view(data_type.numpy()).reshape(tuple(tensor.dims))
        value.const_value = onnx_ir.Tensor(data, dtype=data_type, name=tensor.name)


class _Scanner:
    """Goes through a file field by field; what nothing is taken out of is parsed as it stands there."""

    def __init__(self, file: IO[bytes], content: mmap.mmap, with_data: bool) -> None:
        self.file = file
        self.with_data = with_data
        self.content = content
        self.arrays: Arrays = {}

    def model(self) -> bytes:
        """The serialised model without the data of large initializers, which are put into ``arrays``."""
        graphs = [(start, body, end) for number, start, body, end in fields(self.content) if number == _GRAPH]
        if len(graphs) != 1:
            raise _Unusual
        ((start, body, end),) = graphs
        graph = self.graph(body, end)
        return b"".join((self.content[:start], delimited(_GRAPH, len(graph)), graph, self.content[end:]))

    def graph(self, at: int | None, end: int) -> bytes:
        if at is None:
            raise _Unusual
        parts: list[bytes] = []
        place = 0
        for number, start, body, after in fields(self.content, at, end):
            if number != _INITIALIZER or body is None:
                continue
            if after - body >= LEAST_BYTES:
                tensor = self.tensor(place, body, after)
                parts += [self.content[at:start], delimited(_INITIALIZER, len(tensor)), tensor]
                at = after
            place += 1
        return b"".join((*parts, self.content[at:end]))

    def tensor(self, place: int, at: int, end: int) -> bytes:
        """A serialised tensor, without its data where that is put into an array."""
        found = list(fields(self.content, at, end))
        numbers = {number for number, _, _, _ in found}
        data = [(start, body, after) for number, start, body, after in found if number == _RAW_DATA]
        if len(data) != 1 or not numbers <= _PLAIN_FIELDS:
            return self.content[at:end]
        ((start, body, after),) = data
        head = self.content[at:start] + self.content[after:end]
        if body is None or not _fits(onnx.TensorProto.FromString(head), after - body):
            return self.content[at:end]
        if self.with_data:
            self.arrays[place] = self.array(body, after - body)
        return head

    def array(self, at: int, length: int) -> np.ndarray:
        array = np.empty(length, np.uint8)
        self.file.seek(at)
        if self.file.readinto(array) != length:  # type: ignore[attr-defined]
            raise _Unusual
        return array


def _fits(tensor: Any, length: int) -> bool:
    """Whether a tensor of a type that numpy has is its data of this many bytes, number by number."""
    data_type = onnx_ir.DataType(tensor.data_type)
    if not tensor.name or data_type.name not in _PLAIN_TYPES:
        return False
    return int(np.prod(tensor.dims, dtype=object)) * data_type.numpy().itemsize == length
