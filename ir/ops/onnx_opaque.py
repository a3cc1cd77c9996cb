"""``onnx_call``: an ONNX node without a reader, kept verbatim and run by onnxruntime; nothing it touches may be cut.

    %y = onnx_call(%x, op_type="NonZero", model=b"...", reason="there is no record for it")

``model`` is a serialised model of this one node; its graph inputs are the operands in order.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from regauge.ir.axis_rules.rules import Axes, Call
from regauge.ir.errors import OperatorError, first_line
from regauge.ir.operator import operator

# Types that numpy lacks travel as bits: (torch dtype, type of the bits, ONNX element type).
_BITS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.bfloat16: (torch.int16, 16),
    torch.float8_e4m3fn: (torch.uint8, 17),
    torch.float8_e4m3fnuz: (torch.uint8, 18),
    torch.float8_e5m2: (torch.uint8, 19),
    torch.float8_e5m2fnuz: (torch.uint8, 20),
}
_FROM_TYPE = {
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(float8e4m3fn)": torch.float8_e4m3fn,
    "tensor(float8e4m3fnuz)": torch.float8_e4m3fnuz,
    "tensor(float8e5m2)": torch.float8_e5m2,
    "tensor(float8e5m2fnuz)": torch.float8_e5m2fnuz,
}


@lru_cache(maxsize=256)
def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def to_runtime(operand: Any) -> Any:
    import onnxruntime

    if isinstance(operand, torch.Tensor):
        operand = operand.detach().cpu().contiguous()
        if operand.dtype in _BITS:
            bits, element_type = _BITS[operand.dtype]
            array = operand.view(bits).numpy()
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element_type)
        operand = operand.numpy()
    if isinstance(operand, list):
        return [to_runtime(part) for part in operand]
    array = np.asarray(operand)
    # types below eight bits come as ml_dtypes arrays; the model takes them as bytes, or as float32, and casts
    wider = {"int4": np.int8, "int2": np.int8, "uint4": np.uint8, "uint2": np.uint8, "float4_e2m1fn": np.float32}
    return array.astype(wider[array.dtype.name]) if array.dtype.name in wider else array


def _from_runtime(result: Any) -> Any:
    if isinstance(result, list):
        return [_from_runtime(part) for part in result]
    if isinstance(result, np.ndarray) and result.dtype.kind in "biufc":
        return torch.from_numpy(np.ascontiguousarray(result)).reshape(result.shape)
    return result


def run_session(session: Any, feeds: dict[str, Any]) -> list[Any]:
    import onnxruntime

    described = [output.type for output in session.get_outputs()]
    if not any(kind in _FROM_TYPE for kind in described):
        return [_from_runtime(result) for result in session.run(None, feeds)]
    values = {
        name: v if isinstance(v, onnxruntime.OrtValue) else onnxruntime.OrtValue.ortvalue_from_numpy(v)
        for name, v in feeds.items()
    }
    results = session.run_with_ort_values(None, values)
    return [
        _from_memory(result, _FROM_TYPE[kind]) if kind in _FROM_TYPE else _from_runtime(result.numpy())
        for result, kind in zip(results, described, strict=True)
    ]


def _from_memory(value: Any, dtype: torch.dtype) -> torch.Tensor:
    """An OrtValue of a type that numpy lacks, and DLPack where it has 8 bits."""
    shape = tuple(value.shape())
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    data = bytearray(ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize))
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


def _rule(call: Call) -> list[Axes]:
    return call.opaque(f"{call['op_type']} is kept as it is ({call['reason']})")


@operator(rule=_rule)
def onnx_call(*operands, op_type, model, reason=""):  # type: ignore[no-untyped-def]
    """Run the node through onnxruntime, unoptimised; raises OperatorError where onnxruntime does not know it."""
    try:
        session = _session(model)
    except Exception as error:
        first = first_line(error)
        raise OperatorError(f"onnxruntime cannot run {op_type}: {first}; register the operator's library") from error
    names = [value.name for value in session.get_inputs()]
    return tuple(run_session(session, {name: to_runtime(o) for name, o in zip(names, operands, strict=True)}))
