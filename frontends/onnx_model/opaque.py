"""ONNX nodes that are kept as they are: a model of the one node, and the shapes of its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir
import sympy
import torch

from regauge.frontends.onnx_model.call import resolved_attributes
from regauge.frontends.onnx_model.file import captured_values
from regauge.frontends.onnx_model.functions import called_functions
from regauge.frontends.onnx_model.scope import Entry, Scope
from regauge.frontends.onnx_model.weights import data_type_of, dtype_of, read_tensor, torch_from_array
from regauge.ir.dtypes import Dtype
from regauge.ir.errors import RegaugeError
from regauge.ir.graph import Value
from regauge.ir.operator import get_operator
from regauge.ir.sizes.expressions import (
    UNKNOWN_RANK,
    Bindings,
    Size,
    UnknownRank,
    evaluate,
    floor_divide,
    format_size,
    parse_size,
    prime_hints,
    product,
    symbol,
    symbols_in,
)

Type: TypeAlias = tuple[tuple[Size, ...], Dtype]
_TYPES = onnx_ir.DataType
_STANDARD = ("", "ai.onnx")
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
        tensor = scope.find(onnx_value).tensor  # of few bits, it may be held in bytes
        kind = value.dtype if tensor is None else dtype_of(tensor.dtype)
        info = onnx.helper.make_tensor_value_info(onnx_value.name or "", int(data_type_of(kind)), None)
        if value.dtype in ("sequence", "optional") and onnx_value.type is not None:
            info = onnx_ir.to_proto(onnx_ir.Value(name=onnx_value.name, type=onnx_value.type))
        if kind in CARRIED_AS:
            info.name = f"{onnx_value.name}__held"
            info.type.tensor_type.elem_type = int(CARRIED_AS[str(kind)])
            cast_to = int(data_type_of(kind))
            casts.append(onnx.helper.make_node("Cast", [info.name], [onnx_value.name or ""], to=cast_to))
        inputs.append(info)
    outputs = [onnx.ValueInfoProto(name=name) for name in node_proto.output if name]
    graph = onnx.helper.make_graph([*casts, node_proto], node.op_type, inputs, outputs)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in scope.opsets.items()]
    functions = [onnx_ir.to_proto(function) for function in called_functions(model, node)]
    return onnx.helper.make_model(
        graph, opset_imports=opsets, ir_version=max(model.ir_version or 8, 4), functions=functions
    )


def _result_types(scope: Scope, node: onnx_ir.Node, proto: Any, onnx_operands: list[onnx_ir.Value]) -> list[Type]:
    """Shape and dtype of each named output: by ONNX's inference on the one node, else what the model itself says.

    Where neither says how many axes there are, that follows from data, and the rank is unknown; only of an operator
    that ONNX does not have is it found by running the node.
    """
    inferred = _infer(scope, proto, onnx_operands)
    outputs = [value for value in node.outputs if value.name]
    known = symbols_in([scope.find(v).shape for v in onnx_operands])
    asked = _asked(scope, node)
    types = [_told(inferred.get(value.name or ""), value, known, asked) for value in outputs]
    foreign = node.domain not in _STANDARD and not proto.functions
    if foreign and any(isinstance(shape, UnknownRank) for shape, _ in types):
        probed = _probe(scope, proto, onnx_operands, [value.name or "" for value in outputs])
        if probed is not None:
            return probed
    return types


def _asked(scope: Scope, node: onnx_ir.Node) -> dict[int, Size]:
    """Sizes by axis that a Reshape is asked for: the result has them, also where none are seen to fit the operand's."""
    target = scope.find(node.inputs[1]).content if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if node.op_type != "Reshape" or node.domain not in _STANDARD or target is None:
        return {}
    if not target.integral or target.undecided:
        return {}
    sizes = dict(enumerate(target.sizes()))
    asked = {axis: size for axis, size in sizes.items() if size not in (0, -1)}
    operand = scope.find(node.inputs[0]) if node.inputs[0] is not None else None
    if len(asked) == len(sizes) - 1 and -1 in sizes.values() and operand is not None and operand.ranked:
        rest = next(axis for axis, size in sizes.items() if size == -1)
        asked[rest] = floor_divide(product(operand.shape), product(asked.values()))
    return asked


def _told(
    found: onnx_ir.Value | None, stated: onnx_ir.Value, known: set[sympy.Symbol], asked: Mapping[int, Size]
) -> Type:
    """The type of an output as it was inferred, or else as the model states it."""
    kind = stated.type if found is None or found.type is None else found.type
    if isinstance(kind, onnx_ir.SequenceType | onnx_ir.OptionalType):
        return (), "sequence" if isinstance(kind, onnx_ir.SequenceType) else "optional"
    dtype = dtype_of(next((v.dtype for v in (found, stated) if v is not None and v.dtype is not None), None))
    name = stated.name or ""
    if found is not None and found.shape is not None:
        sizes = tuple(_size(dimension, f"{name}_{i}") for i, dimension in enumerate(found.shape))
        # a size that inference made up is named alike at every node: it is one of this node's own
        own = (asked.get(i, symbol(f"{name}_{i}")) for i in range(len(sizes)))
        return tuple(s if symbols_in(s) <= known else o for s, o in zip(sizes, own, strict=True)), dtype
    if stated.shape is not None:
        return tuple(_size(dimension, f"{name}_{i}") for i, dimension in enumerate(stated.shape)), dtype
    return UNKNOWN_RANK, dtype


def _probe(scope: Scope, proto: Any, onnx_operands: list[onnx_ir.Value], names: list[str]) -> list[Type] | None:
    """Run the node on two sets of dynamic sizes and of data and see what comes: what differs follows from them.

    Sizes that differ get symbols of their own; None where it does not run on both.
    """
    run = get_operator("onnx_call").evaluate
    entries = [scope.find(onnx_value) for onnx_value in onnx_operands]
    symbols = symbols_in([e.shape for e in entries])
    found = []
    for content, avoid in enumerate((8, 20)):
        bindings = prime_hints(symbols, avoid)
        try:
            operands = [_stand_in(entry, bindings, content) for entry in entries]
            found.append(run(*operands, op_type="", model=proto.SerializeToString()))
        except Exception:  # it may need particular data; what it gives stays unknown
            return None
    types: list[Type] = []
    for name, first, second in zip(names, *found, strict=True):
        if isinstance(first, list):
            types.append(((), "sequence"))
            continue
        dtype: Dtype = first.dtype if isinstance(first, torch.Tensor) else "string"
        if len(first.shape) != len(second.shape):
            types.append((UNKNOWN_RANK, dtype))
            continue
        pairs = enumerate(zip(first.shape, second.shape, strict=True))
        types.append((tuple(int(a) if a == b else symbol(f"{name}_{i}") for i, (a, b) in pairs), dtype))
    return types


def _stand_in(entry: Entry, bindings: Bindings, content: int) -> Any:
    """What the node reads, where it is known; else as many entries of one content as there are."""
    if entry.tensor is not None:
        return read_tensor(entry.tensor)
    if entry.content is not None:
        flat = [evaluate(e, bindings) for e in entry.content.array.reshape(-1).tolist()]
        array = np.array(flat, dtype=entry.content.data_type.numpy()).reshape(entry.content.array.shape)
        return torch_from_array(array, dtype_of(entry.content.data_type))
    if not isinstance(entry.dtype, torch.dtype) or not entry.ranked:
        raise RegaugeError(f"there is no stand-in for a {entry.dtype}")
    return torch.full([evaluate(size, bindings) for size in entry.shape], content, dtype=entry.dtype)


def _size(dimension: Any, name: str) -> Size:
    if isinstance(dimension, int):
        return dimension
    if dimension.value:
        try:
            return parse_size(dimension.value)
        except RegaugeError:
            pass
    return symbol(name)


def _infer(scope: Scope, proto: Any, onnx_operands: list[onnx_ir.Value]) -> dict[str, onnx_ir.Value]:
    import onnx

    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    for info, onnx_value in zip(copied.graph.input, onnx_operands, strict=True):
        entry = scope.find(onnx_value)
        if not info.type.HasField("tensor_type") or not entry.ranked:
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
        if entry.tensor is None or entry.tensor.dtype == onnx_ir.DataType.STRING:  # texts decide no size
            continue
        if entry.tensor.nbytes <= SMALL and info.name == onnx_value.name:
            tensor = onnx_ir.to_proto(
                onnx_ir.Tensor(entry.tensor.numpy(), dtype=entry.tensor.dtype, name=onnx_value.name)
            )
            copied.graph.initializer.append(tensor)
    try:
        inferred = onnx.shape_inference.infer_shapes(copied, data_prop=True)
    except Exception:  # whatever it stumbles over, the model's own value_info is the fallback
        return {}
    return {v.name: v for info in inferred.graph.output for v in [onnx_ir.from_proto(info)]}
