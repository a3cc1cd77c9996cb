"""The form of fused regions in ONNX files: local functions of one domain, whose metadata holds the region's text.

regauge.region      the region as text, of which readers make a fused node again
regauge.hash        of the nodes of the function: where it is another one, the nodes are what counts
regauge.rounding    ``fused`` or ``eager``, what a kernel rounds
regauge.axes        the loops of every operand and result, as ``x: i0 r0, weight: r0 -> add: i0 r0``
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

DOMAIN = "regauge.kernels"
VERSION = 1
REGION, HASH, ROUNDING, AXES = (f"regauge.{name}" for name in ("region", "hash", "rounding", "axes"))
KERNEL = "regauge.kernel"  # in the metadata of a fused node without its region: the function that it calls


def function_hash(function: Any) -> str:
    """A hash of what the nodes of an ``onnx_ir.Function`` compute, whatever they and their values are called."""
    numbers = {value: number for number, value in enumerate(function.inputs)}
    lines = [f"{len(function.inputs)} {sorted(function.opset_imports.items())}"]
    for node in function:
        read = [numbers.get(value, "other") for value in node.inputs]
        attributes = [f"{name}={_attribute(attribute)}" for name, attribute in sorted(node.attributes.items())]
        numbers.update((value, len(numbers) + place) for place, value in enumerate(node.outputs))
        lines.append(f"{node.domain}.{node.op_type} {read} {attributes} {len(node.outputs)}")
    lines.append(str([numbers.get(value, "other") for value in function.outputs]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:10]


def _attribute(attribute: Any) -> str:
    value = attribute.value
    if isinstance(value, float):
        value = float(np.float32(value))  # as it is stored
    if hasattr(value, "numpy"):
        return f"{value.dtype} {list(value.shape.numpy())} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return repr(value)
