"""Tensors of ONNX models as weights: element types, memory-mapped external data, small contents."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch

from regauge.ir.dtypes import Dtype
from regauge.ir.errors import LoadError
from regauge.ir.storage.weights import DenseWeight, LazyWeight, Weight

_TYPES = onnx_ir.DataType

_TORCH: dict[onnx_ir.DataType, torch.dtype] = {
    _TYPES.FLOAT: torch.float32, _TYPES.DOUBLE: torch.float64, _TYPES.FLOAT16: torch.float16,
    _TYPES.BFLOAT16: torch.bfloat16, _TYPES.INT8: torch.int8, _TYPES.INT16: torch.int16, _TYPES.INT32: torch.int32,
    _TYPES.INT64: torch.int64, _TYPES.UINT8: torch.uint8, _TYPES.UINT16: torch.uint16, _TYPES.UINT32: torch.uint32,
    _TYPES.UINT64: torch.uint64, _TYPES.BOOL: torch.bool, _TYPES.COMPLEX64: torch.complex64,
    _TYPES.COMPLEX128: torch.complex128, _TYPES.FLOAT8E4M3FN: torch.float8_e4m3fn,
    _TYPES.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz, _TYPES.FLOAT8E5M2: torch.float8_e5m2,
    _TYPES.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz, _TYPES.FLOAT8E8M0: torch.float8_e8m0fnu,
}  # fmt: skip
_ONNX = {dtype: data_type for data_type, dtype in _TORCH.items()}

# Types that numpy has only through ml_dtypes: torch takes them over as bits of the same width.
_AS_BITS = {
    torch.bfloat16: np.int16, torch.float8_e4m3fn: np.uint8, torch.float8_e4m3fnuz: np.uint8,
    torch.float8_e5m2: np.uint8, torch.float8_e5m2fnuz: np.uint8, torch.float8_e8m0fnu: np.uint8,
}  # fmt: skip

# Integers of fewer bits than a byte: what holds each of them in a graph, and their bits.
FEW_BITS = {
    _TYPES.INT4: (torch.int8, 4), _TYPES.UINT4: (torch.uint8, 4), _TYPES.INT2: (torch.int8, 2),
    _TYPES.UINT2: (torch.uint8, 2),
}  # fmt: skip

_KINDS = onnx_ir.AttributeType
_HOLDING = (_KINDS.TENSOR, _KINDS.TENSORS, _KINDS.GRAPH, _KINDS.GRAPHS)

DENSE_BYTES = 1024  # a tensor up to this size is simply kept


def dtype_of(data_type: onnx_ir.DataType | None) -> Dtype:
    """The torch dtype of an ONNX element type, or its lower-case name where torch has none (``string``, ``int4``)."""
    if data_type is None or data_type == _TYPES.UNDEFINED:
        return "unknown"
    return _TORCH.get(data_type) or data_type.name.lower()


def data_type_of(dtype: Dtype) -> onnx_ir.DataType:
    """The ONNX element type of a dtype of ours."""
    if isinstance(dtype, torch.dtype):
        return _ONNX[dtype]
    return _TYPES.__members__.get(dtype.upper(), _TYPES.UNDEFINED)


def is_float(data_type: onnx_ir.DataType) -> bool:
    return bool(data_type.is_floating_point()) or data_type in (_TYPES.COMPLEX64, _TYPES.COMPLEX128)


def torch_from_array(array: np.ndarray, dtype: Dtype) -> Any:
    """A torch tensor that shares the array's memory where it can; types torch lacks stay numpy arrays."""
    if not isinstance(dtype, torch.dtype):
        return array
    if not array.flags.c_contiguous or array.dtype.byteorder == ">":
        array = np.ascontiguousarray(array)
    if array.flags.writeable:
        return _shared(array, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return _shared(array, dtype)


def _shared(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    if dtype in _AS_BITS:
        return torch.from_numpy(array.view(_AS_BITS[dtype])).view(dtype)
    return torch.from_numpy(array) if array.ndim else torch.from_numpy(array.reshape(1)).reshape(())


def read_tensor(tensor: onnx_ir.TensorProtocol) -> Any:
    """The data of an ONNX tensor: a copy for external data, so that no file stays mapped; shared memory otherwise."""
    dtype = dtype_of(tensor.dtype)
    if isinstance(tensor, onnx_ir.StringTensor):  # onnxruntime takes bytes for what Python prints of them
        texts = [text.decode() for text in tensor.string_data()]
        return np.array(texts, dtype=object).reshape(tensor.shape.numpy())
    if not isinstance(tensor, onnx_ir.ExternalTensor):
        return torch_from_array(np.asarray(tensor.numpy()), dtype)
    fresh = onnx_ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name or "",
        base_dir=tensor.base_dir,
    )
    try:
        array = np.array(fresh.numpy())
    except (OSError, ValueError) as error:
        raise LoadError(
            f"external data of {tensor.name!r} cannot be read from {Path(tensor.path).name}: {error}; "
            f"put the file back beside the model"
        ) from error
    fresh.release()
    return torch_from_array(array, dtype)


def weight_of(tensor: onnx_ir.TensorProtocol) -> Weight:
    """An ONNX tensor as a weight: read on demand, except for small ones in memory."""
    dtype = dtype_of(tensor.dtype)
    if (
        not isinstance(tensor, onnx_ir.ExternalTensor)
        and isinstance(dtype, torch.dtype)
        and tensor.nbytes <= DENSE_BYTES
    ):
        return DenseWeight(read_tensor(tensor).clone())
    resident = not isinstance(tensor, onnx_ir.ExternalTensor)
    return LazyWeight(tuple(tensor.shape.numpy()), dtype, lambda: read_tensor(tensor), resident)


def codes_of(tensor: onnx_ir.TensorProtocol) -> Weight:
    """A tensor of integers of fewer bits than a byte as a weight that has a byte for each."""
    dtype, _ = FEW_BITS[tensor.dtype]
    kind = np.int8 if dtype == torch.int8 else np.uint8
    resident = not isinstance(tensor, onnx_ir.ExternalTensor)
    shape = tuple(tensor.shape.numpy())
    return LazyWeight(shape, dtype, lambda: torch.from_numpy(np.asarray(read_tensor(tensor)).astype(kind)), resident)


def tensors_of(graph: onnx_ir.Graph | onnx_ir.Function) -> Iterator[onnx_ir.TensorProtocol]:
    """Every tensor a graph holds: initializers and tensor attributes, those of nested graphs included."""
    if isinstance(graph, onnx_ir.Graph):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for node in graph:
        for attribute in node.attributes.data.values():
            kind = attribute.type
            if kind not in _HOLDING or attribute.is_ref():
                continue
            if kind == _KINDS.TENSOR:
                yield attribute.value
            elif kind == _KINDS.TENSORS:
                yield from attribute.value
            elif kind == _KINDS.GRAPH:
                yield from tensors_of(attribute.value)
            else:
                for inner in attribute.value:
                    yield from tensors_of(inner)
