"""Writing a model without a second copy of its weights: one by one, in between what is serialised.

The file is the one that protobuf would write, byte for byte: fields in the order of their numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch

from regauge.ir.storage.protobuf_wire import delimited, fields

LEAST_BYTES = 1 << 12  # smaller tensors are serialised with all else
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # numbers of fields in onnx.proto


class _Hollow:
    """A tensor without its data, as far as the serialisation of onnx_ir asks."""

    def __init__(self, tensor: Any) -> None:
        self.name, self.doc_string, self.metadata_props = tensor.name, tensor.doc_string, tensor.metadata_props
        self.dtype, self.shape, self.nbytes = tensor.dtype, tensor.shape, 0

    def tobytes(self) -> bytes:
        return b""


@contextmanager
def hollow_initializers(model: onnx_ir.Model) -> Iterator[dict[int, Any]]:
    """While it lasts, large initializers of the main graph have no data; gives the tensors by their place."""
    found: dict[int, Any] = {}
    values = [value for value in model.graph.initializers.values() if value.const_value is not None]
    streamed = {place: value for place, value in enumerate(values) if _is_streamed(value.const_value)}
    try:
        for place, value in streamed.items():
            found[place] = value.const_value
            hollow: Any = _Hollow(value.const_value)
            value.const_value = hollow
        yield found
    finally:
        for place, tensor in found.items():
            streamed[place].const_value = tensor


def _is_streamed(tensor: Any) -> bool:
    if not isinstance(tensor, onnx_ir.Tensor | onnx_ir.LazyTensor) or sys.byteorder != "little":
        return False
    return bool(tensor.dtype.bitwidth >= 8 and tensor.nbytes >= LEAST_BYTES)


def write_proto(proto: Any, tensors: Mapping[int, Any], path: Path) -> None:
    """Write a ModelProto whose initializers at the places of ``tensors`` have no data: it is theirs.

    The message is not to be used afterwards. Raises ValueError where a tensor is not as large as it says.
    """
    names = {place: proto.graph.initializer[place].name for place in tensors}
    pieces = [_initializer(tensor, tensors.get(place)) for place, tensor in enumerate(proto.graph.initializer)]
    del proto.graph.initializer[:]
    before, after = _around(proto.graph.SerializeToString(), _INITIALIZER)
    size = len(before) + len(after) + sum(len(head) + length + len(tail) for head, length, _, tail in pieces)
    proto.ClearField("graph")
    first, last = _around(proto.SerializeToString(), _GRAPH)
    with open(path, "wb") as file:
        file.write(first + delimited(_GRAPH, size) + before)
        for place, (head, length, tensor, tail) in enumerate(pieces):
            file.write(head)
            if tensor is not None:
                data = _data_of(tensor)
                if data.nbytes != length:
                    raise ValueError(f"{names[place]} has {data.nbytes} bytes, its shape and type say {length}")
                file.write(data.data)
            file.write(tail)
        file.write(after + last)


def _initializer(proto: Any, tensor: Any) -> tuple[bytes, int, Any, bytes]:
    """An initializer as a field of the graph: what is before its data, the bytes of these, their tensor, the rest."""
    if tensor is None:
        serialised = proto.SerializeToString()
        return delimited(_INITIALIZER, len(serialised)) + serialised, 0, None, b""
    proto.ClearField("raw_data")
    head, tail = _around(proto.SerializeToString(), _RAW_DATA)
    head += delimited(_RAW_DATA, tensor.nbytes)
    return delimited(_INITIALIZER, len(head) + tensor.nbytes + len(tail)) + head, tensor.nbytes, tensor, tail


def _around(message: bytes, number: int) -> tuple[bytes, bytes]:
    """A serialised message in two, at the place of a field that it lacks."""
    cut = next((start for field, start, _, _ in fields(message) if field > number), len(message))
    return message[:cut], message[cut:]


def _data_of(tensor: Any) -> np.ndarray:
    """The data of a tensor as bytes, without a copy where they lie in memory in order."""
    if isinstance(tensor, onnx_ir.LazyTensor):
        tensor = tensor.raw()
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if isinstance(raw, np.ndarray) and raw.dtype.byteorder != ">":
        return np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    return np.frombuffer(tensor.tobytes(), np.uint8)
