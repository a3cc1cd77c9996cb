"""ONNX nodes that are kept as they are: a model of the one node, and the shapes of its results."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir
import sympy
import torch

from regauge.frontends.onnx_call import resolved_attributes
from regauge.frontends.onnx_file import captured_values
from regauge.frontends.onnx_scope import Entry, Scope
from regauge.frontends.onnx_weights import data_type_of, dtype_of, read_tensor, torch_from_array
from regauge.ir.dtypes import Dtype
from regauge.ir.errors import RegaugeError
from regauge.ir.graph import Value
from regauge.ir.operator import get_operator
from regauge.ir.sizes import Bindings, Size, evaluate, format_size, parse_size, prime_hints, symbol, symbols_in

_TYPES = onnx_ir.DataType
CARRIED_AS = {
    "int4": _TYPES.INT8, "uint4": _TYPES.UINT8, "int2": _TYPES.INT8, "uint2": _TYPES.UINT8, "float4e2m1": _TYPES.FLOAT,
}  # fmt: skip
"""Types that enter onnxruntime from Python only as a wider one, followed by a Cast."""

SMALL = 4096  # bytes; constants up to this size take part in the shape inference of a node kept as it is


def emit_opaque(model: onnx_ir.Model, scope: Scope, node: onnx_ir.Node, reason: str) -> tuple[Value, ...]:
    """Add an ``onnx_call`` for a node; returns a Value per named output."""
    onnx_operands = list(dict.fromkeys([*(v for v in node.inputs if v is not None), *captured_values(node)]))
    operands = [scope.operand(onnx) for onnx in onnx_operands]
    proto = _one_node_model(model, scope, node, onnx_operands, operands)
    results = _result_types(scope, node, proto, onnx_operands)
    found = scope.build(
        "onnx_call",
        *operands,
        op_type=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
        model=proto.SerializeToString(),
        reason=reason,
        results=results,
    )
    return found if isinstance(found, tuple) else (found,)


def _one_node_model(
    model: onnx_ir.Model, scope: Scope, node: onnx_ir.Node, onnx_operands: list[onnx_ir.Value], operands: list[Value]
) -> Any:
    import onnx

    node_proto = onnx_ir.to_proto(node)
    del node_proto.attribute[:]
    node_proto.attribute.extend(onnx_ir.to_proto(a) for a in resolved_attributes(node, scope).values())
    inputs, casts = [], []
    for onnx_value, value in zip(onnx_operands, operands, strict=True):
        info = onnx.helper.make_tensor_value_info(onnx_value.name or "", int(data_type_of(value.dtype)), None)
        if value.dtype in ("sequence", "optional") and onnx_value.type is not None:
            info = onnx_ir.to_proto(onnx_ir.Value(name=onnx_value.name, type=onnx_value.type))
        if value.dtype in CARRIED_AS:
            info.name = f"{onnx_value.name}__held"
            info.type.tensor_type.elem_type = int(CARRIED_AS[str(value.dtype)])
            cast_to = int(data_type_of(value.dtype))
            casts.append(onnx.helper.make_node("Cast", [info.name], [onnx_value.name or ""], to=cast_to))
        inputs.append(info)
    outputs = [onnx.ValueInfoProto(name=name) for name in node_proto.output if name]
    graph = onnx.helper.make_graph([*casts, node_proto], node.op_type, inputs, outputs)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in scope.opsets.items()]
    functions = [onnx_ir.to_proto(function) for function in model.functions.values()]
    return onnx.helper.make_model(
        graph, opset_imports=opsets, ir_version=max(model.ir_version or 8, 4), functions=functions
    )


def _result_types(
    scope: Scope, node: onnx_ir.Node, proto: Any, onnx_operands: list[onnx_ir.Value]
) -> list[tuple[tuple[Size, ...], Dtype]]:
    """Shape and dtype of each named output: by ONNX's inference on the one node, else what the model itself says."""
    inferred = _infer(scope, proto, onnx_operands)
    met = {size for onnx_value in onnx_operands for size in symbols_in(scope.find(onnx_value).shape)}
    if any(_incomplete(inferred.get(v.name), v) for v in node.outputs if v.name):
        probed = _probe(scope, proto, onnx_operands, [v.name for v in node.outputs if v.name])
        if probed is not None:
            return probed
    results: list[tuple[tuple[Size, ...], Dtype]] = []
    for value in node.outputs:
        if not value.name:
            continue
        found = inferred.get(value.name)
        names: set[sympy.Symbol] | None = met
        if found is None or found.dtype is None or found.shape is None:
            if value.shape is not None or found is None:
                found, names = value, None
        if isinstance(found.type, onnx_ir.SequenceType | onnx_ir.OptionalType):
            results.append(((), "sequence" if isinstance(found.type, onnx_ir.SequenceType) else "optional"))
            continue
        dimensions = () if found.shape is None else found.shape
        shape = tuple(_size(d, f"{value.name}_{i}", names) for i, d in enumerate(dimensions))
        results.append((shape, dtype_of(found.dtype) if found.shape is not None else "unknown"))
    return results


def _incomplete(found: onnx_ir.Value | None, stated: onnx_ir.Value) -> bool:
    """Whether neither inference nor the model tells the rank and type of a tensor."""
    if found is not None and isinstance(found.type, onnx_ir.SequenceType | onnx_ir.OptionalType):
        return False
    return all(v is None or v.shape is None or v.dtype is None for v in (found, stated))


def _probe(
    scope: Scope, proto: Any, onnx_operands: list[onnx_ir.Value], names: list[str]
) -> list[tuple[tuple[Size, ...], Dtype]] | None:
    """Run the node on two sets of dynamic sizes and see what comes: sizes that differ get symbols of their own."""
    run = get_operator("onnx_call").evaluate
    entries = [scope.find(onnx_value) for onnx_value in onnx_operands]
    symbols = {s for e in entries for s in symbols_in(e.shape)}
    found = []
    for avoid in (8, 20):
        bindings = prime_hints(symbols, avoid)
        try:
            operands = [_stand_in(entry, bindings) for entry in entries]
            found.append(run(*operands, op_type="", model=proto.SerializeToString()))
        except Exception:  # it may need particular data; what it gives stays unknown
            return None
    types: list[tuple[tuple[Size, ...], Dtype]] = []
    for name, first, second in zip(names, *found, strict=True):
        if isinstance(first, list):
            types.append(((), "sequence"))
            continue
        pairs = enumerate(zip(first.shape, second.shape, strict=True))
        sizes = tuple(int(a) if a == b else symbol(f"{name}_{i}") for i, (a, b) in pairs)
        types.append((sizes, first.dtype if isinstance(first, torch.Tensor) else "string"))
    return types


def _stand_in(entry: Entry, bindings: Bindings) -> Any:
    if entry.tensor is not None:
        return read_tensor(entry.tensor)
    if entry.content is not None:
        flat = [evaluate(e, bindings) for e in entry.content.array.reshape(-1).tolist()]
        array = np.array(flat, dtype=entry.content.data_type.numpy()).reshape(entry.content.array.shape)
        return torch_from_array(array, dtype_of(entry.content.data_type))
    if not isinstance(entry.dtype, torch.dtype):
        raise RegaugeError(f"there is no stand-in for a {entry.dtype}")
    return torch.zeros([evaluate(size, bindings) for size in entry.shape], dtype=entry.dtype)


def _size(dimension: Any, name: str, met: Collection[sympy.Symbol] | None) -> Size:
    """A size that inference made up (``unk__0``, in each node anew), unlike those it has met, is one of its own."""
    if isinstance(dimension, int):
        return dimension
    if dimension.value:
        try:
            size = parse_size(dimension.value)
        except RegaugeError:
            return symbol(name)
        if met is None or symbols_in(size) <= set(met):
            return size
    return symbol(name)


def _infer(scope: Scope, proto: Any, onnx_operands: list[onnx_ir.Value]) -> dict[str, onnx_ir.Value]:
    import onnx

    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    for info, onnx_value in zip(copied.graph.input, onnx_operands, strict=True):
        entry = scope.find(onnx_value)
        if not info.type.HasField("tensor_type"):
            continue
        shape = info.type.tensor_type.shape
        for size in entry.shape:
            dimension = shape.dim.add()
            if isinstance(size, int):
                dimension.dim_value = size
            else:
                dimension.dim_param = format_size(size)
        if not entry.shape:
            shape.SetInParent()
        if entry.tensor is not None and entry.tensor.nbytes <= SMALL and info.name == onnx_value.name:
            tensor = onnx_ir.to_proto(
                onnx_ir.Tensor(entry.tensor.numpy(), dtype=entry.tensor.dtype, name=onnx_value.name)
            )
            copied.graph.initializer.append(tensor)
    try:
        inferred = onnx.shape_inference.infer_shapes(copied, data_prop=True)
    except Exception:  # whatever it stumbles over, the model's own value_info is the fallback
        return {}
    return {v.name: v for info in inferred.graph.output for v in [onnx_ir.from_proto(info)]}
