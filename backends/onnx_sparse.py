"""Weights with many zeros as sparse initializers, where the file becomes smaller by that.

A sparse initializer is the values that are not zero, in order, and their flat positions. Positions are written as
protobuf packs numbers, one to four bytes each, where raw data would take eight: a weight in float32 of which half is
zero is smaller already. onnxruntime makes such weights dense when it loads a model, so neither memory nor speed change.
The shape inference of the onnx package reads them as another type, and its checker refuses them with full_check=True;
its ordinary check passes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_BYTES = {1: 4, 10: 2, 11: 8}  # of the element types that are stored so: float, float16, double


def store_sparsely(graph: Any) -> int:
    """Make initializers of a GraphProto sparse where that is smaller; returns how many.

    Weights that callers may override, that lie outside of the file or in nested graphs stay as they are. So do all
    bits: a negative zero is a value.
    """
    inputs = {value.name for value in graph.input}
    found = {}
    for tensor in graph.initializer:
        if tensor.name in inputs or tensor.data_type not in _BYTES or not tensor.raw_data:
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

    entries = np.frombuffer(tensor.raw_data, dtype=np.uint8).reshape(-1, _BYTES[tensor.data_type])
    positions = np.flatnonzero(entries.any(1))
    sparse = onnx.SparseTensorProto()
    sparse.values.CopyFrom(tensor)
    sparse.values.raw_data = entries[positions].tobytes()
    del sparse.values.dims[:]
    sparse.values.dims.append(len(positions))
    sparse.dims.extend(tensor.dims)
    sparse.indices.data_type = onnx.TensorProto.INT64
    sparse.indices.dims.append(len(positions))
    sparse.indices.int64_data.extend(positions.tolist())
    return sparse
