"""Equal constants of the carried ONNX model are kept once, and equal shape arithmetic of one scope too.

The constant that is kept is an initializer of the main graph, which every nested graph sees. Inputs, outputs, tensors
with a quantization annotation and bodies of functions are left alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir.serde import serialize_attribute

from regauge.backends.onnx_model.carrier import Carrier
from regauge.backends.onnx_model.write import ChangedTensor, with_nested
from regauge.ir.sizes.onnx_contents import constant_tensor
from regauge.ir.storage.weights import sampled_bytes

_SHAPE_ARITHMETIC = frozenset(
    {"Shape", "Size", "Gather", "Concat", "Unsqueeze", "Squeeze", "Slice", "Add", "Sub", "Mul", "Div", "Max", "Min"}
)
MOST_HASHED = 1 << 28  # bytes of tensors that are read only to be compared


def share_equal(carrier: Carrier) -> None:
    """Let what reads one of several equal constants read the first of them."""
    if (carrier.model.ir_version or 0) < 4:
        return  # initializers would have to be inputs
    for group in _equal(carrier):
        main = carrier.model.graph
        kept = next((value for value in group if value.graph is main and value.is_initializer()), None)
        kept = kept or carrier.as_initializer(group[0], constant_tensor(group[0]))
        for value in group:
            if value is not kept:
                carrier.supersede(value, kept)


def share_sizes(carrier: Carrier) -> None:
    """Merge equal nodes of shape arithmetic in each scope: sizes are computed anew for every node that needs them."""
    for graph in with_nested(carrier.model.graph):
        first: dict[object, onnx_ir.Node] = {}
        for node in list(graph):
            if node.domain not in ("", "ai.onnx") or node.op_type not in _SHAPE_ARITHMETIC or len(node.outputs) != 1:
                continue
            attributes = sorted(serialize_attribute(a).SerializeToString() for a in node.attributes.data.values())
            key = (node.op_type, tuple(node.inputs), tuple(attributes))
            kept = first.setdefault(key, node)
            if kept is not node and not node.outputs[0].is_graph_output():
                carrier.supersede(node.outputs[0], kept.outputs[0])


def _equal(carrier: Carrier) -> list[list[onnx_ir.Value]]:
    """Constants with the same type, shape and bytes, two or more of each."""
    alike: dict[tuple[object, ...], list[onnx_ir.Value]] = {}
    for value in _constants(carrier):
        tensor = constant_tensor(value)
        if tensor is not None and tensor.dtype != onnx_ir.DataType.STRING and not isinstance(tensor, ChangedTensor):
            alike.setdefault((tensor.dtype, tuple(tensor.shape.numpy())), []).append(value)
    for by in (_some_bytes, _all_bytes):  # most weights are told apart by a few of their bytes
        told: dict[tuple[object, ...], list[onnx_ir.Value]] = {}
        for key, values in alike.items():
            if len(values) > 1 and constant_tensor(values[0]).nbytes <= MOST_HASHED:
                for value in values:
                    told.setdefault((*key, by(constant_tensor(value))), []).append(value)
        alike = told
    return [values for values in alike.values() if len(values) > 1]


def _some_bytes(tensor: Any) -> bytes:
    array = np.ascontiguousarray(tensor.numpy()).reshape(-1)
    return sampled_bytes(array.view(np.uint8))


def _all_bytes(tensor: Any) -> bytes:
    return hashlib.blake2b(tensor.tobytes(), digest_size=16).digest()


def _constants(carrier: Carrier) -> Iterator[onnx_ir.Value]:
    """Initializers and results of Constant nodes, those of the main graph first."""
    for graph in with_nested(carrier.model.graph):
        for value in graph.initializers.values():
            if not carrier.is_input(value) and not value.is_graph_output() and _plain(value, carrier):
                yield value
        for node in graph:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                value = node.outputs[0]
                if not value.is_graph_output() and _plain(value, carrier):
                    yield value


def _plain(value: onnx_ir.Value, carrier: Carrier) -> bool:
    return not value.meta.get("quant_parameter_tensor_names") and value.name not in carrier.referenced
