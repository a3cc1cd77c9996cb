"""Weights with many zeros as sparse initializers, where the file becomes smaller by that.

A sparse initializer is a weight in the layout :class:`regauge.ir.storage.sparse_layouts.Coo`, the only one of ONNX.
Positions are written as protobuf packs numbers, one to four bytes each, where raw data would take eight: a weight in
float32 of which half is zero is smaller already. onnxruntime makes such weights dense when it loads a model, so neither
memory nor speed change.
The shape inference of the onnx package reads them as another type, and its checker refuses them with full_check=True;
its ordinary check passes.
"""

from __future__ import annotations

from typing import Any

import torch

from regauge.ir.storage.sparse_layouts import Coo

_TYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64}  # the element types that are stored so


def store_sparsely(graph: Any) -> int:
    """Make initializers of a GraphProto sparse where that is smaller; returns how many.

    Weights that callers may override, that lie outside of the file or in nested graphs stay as they are. So do all
    bits: a negative zero is a value.
    """
    inputs = {value.name for value in graph.input}
    found = {}
    for tensor in graph.initializer:
        if tensor.name in inputs or tensor.data_type not in _TYPES or not tensor.raw_data:
            continue
        sparse = _sparse(tensor)
        if sparse.ByteSize() < tensor.ByteSize():
            found[tensor.name] = sparse
    dense = [tensor for tensor in graph.initializer if tensor.name not in found]
    if found:
        del graph.initializer[:]
        graph.initializer.extend(dense)
        graph.sparse_initializer.extend(found.values())
    return len(found)


def _sparse(tensor: Any) -> Any:
    import onnx

    entries = torch.frombuffer(bytearray(tensor.raw_data), dtype=_TYPES[tensor.data_type])
    values, positions = (Coo().pack(entries).parts[part] for part in ("values", "positions"))
    sparse = onnx.SparseTensorProto()
    sparse.values.CopyFrom(tensor)
    sparse.values.raw_data = values.numpy().tobytes()
    del sparse.values.dims[:]
    sparse.values.dims.append(len(positions))
    sparse.dims.extend(tensor.dims)
    sparse.indices.data_type = onnx.TensorProto.INT64
    sparse.indices.dims.append(len(positions))
    sparse.indices.int64_data.extend(positions.tolist())
    return sparse
