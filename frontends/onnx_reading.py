"""Reading ONNX files without a second copy of their weights.

Protobuf hands out the data of a tensor as a new copy every time. So large initializers are read from the file straight
into arrays of their own, and what is parsed is the rest of the file, which is small.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx_ir

from regauge.ir.protobuf_wire import DELIMITED, FIXED_BYTES, VARINT, delimited, encode_varint

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
    if path.suffix == ".onnx" and sys.byteorder == "little":
        try:
            with open(path, "rb") as file:
                skeleton, arrays = _Scanner(file, os.fstat(file.fileno()).st_size).model()
            return onnx.ModelProto.FromString(skeleton), arrays
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
    """Goes through a file field by field."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file = file
        self.size = size
        self.at = 0
        self.arrays: Arrays = {}

    def model(self) -> tuple[bytes, Arrays]:
        """The serialised model without the data of large initializers, and these."""
        parts: list[bytes] = []
        graphs = 0
        while self.at < self.size:
            key = self.varint()
            if key == _GRAPH << 3 | DELIMITED:
                graph = self.graph(self.at_end(self.varint()))
                parts += [delimited(_GRAPH, len(graph)), graph]
                graphs += 1
            else:
                parts += self.field(key)
        if graphs != 1:
            raise _Unusual
        return b"".join(parts), self.arrays

    def graph(self, end: int) -> bytes:
        parts: list[bytes] = []
        place = 0
        while self.at < end:
            key = self.varint()
            if key != _INITIALIZER << 3 | DELIMITED:
                parts += self.field(key)
                continue
            length = self.varint()
            tensor = self.read(length) if length < LEAST_BYTES else self.tensor(place, self.at_end(length))
            parts += [delimited(_INITIALIZER, len(tensor)), tensor]
            place += 1
        return b"".join(parts)

    def tensor(self, place: int, end: int) -> bytes:
        """A serialised tensor, without its data where that is put into an array."""
        parts: list[bytes] = []
        data: np.ndarray | None = None
        numbers = set()
        while self.at < end:
            key = self.varint()
            numbers.add(key >> 3)
            if key == _RAW_DATA << 3 | DELIMITED and data is None:
                data = self.array(self.varint())
            else:
                parts += self.field(key)
        head = b"".join(parts)
        if data is not None and numbers <= _PLAIN_FIELDS and _fits(onnx.TensorProto.FromString(head), data):
            self.arrays[place] = data
            return head
        return head if data is None else head + delimited(_RAW_DATA, len(data)) + data.tobytes()

    def array(self, length: int) -> np.ndarray:
        array = np.empty(length, np.uint8)
        self.at_end(length)
        if self.file.readinto(array) != length:  # type: ignore[attr-defined]
            raise _Unusual
        self.at += length
        return array

    def field(self, key: int) -> list[bytes]:
        """A field as it stands in the file."""
        kind = key & 7
        if kind == DELIMITED:
            length = self.varint()
            return [encode_varint(key), encode_varint(length), self.read(length)]
        if kind == VARINT:
            return [encode_varint(key), encode_varint(self.varint())]
        if kind in FIXED_BYTES:
            return [encode_varint(key), self.read(FIXED_BYTES[kind])]
        raise _Unusual

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.read(1)[0]
            number |= (byte & 127) << shift
            if byte < 128:
                return number
            shift += 7

    def read(self, length: int) -> bytes:
        self.at_end(length)
        data = self.file.read(length)
        self.at += length
        return data

    def at_end(self, length: int) -> int:
        """Where ``length`` bytes from here end."""
        if self.at + length > self.size:
            raise _Unusual
        return self.at + length


def _fits(tensor: Any, data: np.ndarray) -> bool:
    """Whether a tensor of a type that numpy has is its data, number by number."""
    data_type = onnx_ir.DataType(tensor.data_type)
    if not tensor.name or data_type.name not in _PLAIN_TYPES:
        return False
    return int(np.prod(tensor.dims, dtype=object)) * data_type.numpy().itemsize == len(data)
