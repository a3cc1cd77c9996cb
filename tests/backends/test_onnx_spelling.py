"""Every operator that can be spelled in ONNX: a node that a pass adds is written, and computes what the record does."""

from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir
import pytest
import torch
from onnx import helper

from onnx_oracle import runtime_outputs
from regauge.backends.onnx_changes import find_changes
from regauge.backends.onnx_emit import patched_model
from regauge.frontends.from_onnx import load
from regauge.ir.edit import Builder, remove_dead, replace_uses
from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph
from regauge.ir.interpret import run
from regauge.ir.operator import Sample, all_operators
from regauge.ir.ops.quantization import FLOATS

OPSETS = (13, 17, 21, 23)
SPELLED = {name: record for name, record in all_operators().items() if record.in_onnx and record.samples}

# Calls that ONNX has no words for, at all opsets together: statistics and random numbers of training, indices counted
# otherwise, windows of different sizes, roundings to decimals, smoothed and area resizing; in older opsets bits,
# float8, wrapped padding and triangles.
REFUSED = {
    "batch_norm": 8, "dropout": 4, "feature_dropout": 4, "max_pool": 4, "adaptive_max_pool": 8, "adaptive_avg_pool": 8,
    "round": 4, "local_response_norm": 4, "bitwise_and": 4, "bitwise_or": 4, "bitwise_xor": 4, "bitwise_not": 2,
    "scatter_nd": 4, "pad": 2, "tril": 2, "triu": 2, "interpolate": 8,
    "quantize": 4, "dequantize": 4, "fake_cast": 2,
}  # fmt: skip


def carrier(sample: Sample, results: tuple[torch.Tensor, ...], opset: int) -> onnx.ModelProto:
    """A model that reads the first tensor of a sample and gives zeros in the form of the results."""
    first = next((x for x in sample.operands if isinstance(x, torch.Tensor)), torch.zeros(2))
    kind = helper.np_dtype_to_tensor_dtype(first.numpy().dtype)
    nodes, outputs, weights = [], [], []
    for index, result in enumerate(results):
        zeros = np.zeros(tuple(result.shape), dtype=result.numpy().dtype)
        weights.append(onnx.numpy_helper.from_array(zeros, f"zeros{index}"))
        nodes.append(helper.make_node("Identity", [f"zeros{index}"], [f"y{index}"]))
        code = helper.np_dtype_to_tensor_dtype(zeros.dtype)
        outputs.append(helper.make_tensor_value_info(f"y{index}", code, result.shape))
    x = helper.make_tensor_value_info("x", kind, first.shape)
    graph = helper.make_graph(nodes, "carrier", [x], outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def replaced(name: str, sample: Sample, results: tuple[torch.Tensor, ...], opset: int) -> Graph:
    """The carried graph with its outputs computed by the operator; all its tensors but the first are weights."""
    graph = load(carrier(sample, results, opset)).copy()
    build, operands, first = Builder(graph, by="test"), [], True
    for index, operand in enumerate(sample.operands):
        if isinstance(operand, torch.Tensor) and not first:
            operands.append(build.parameter(f"weight{index}", operand))
        elif isinstance(operand, torch.Tensor):
            operands.append(graph.inputs[0])
            first = False
        else:
            operands.append(operand)
    made = build(name, *operands, **sample.attributes)
    for old, new in zip(list(graph.outputs), made if isinstance(made, tuple) else (made,), strict=True):
        replace_uses(graph, old, new)  # type: ignore[arg-type]
    remove_dead(graph)
    return graph


def evaluated(name: str, sample: Sample) -> tuple[torch.Tensor, ...]:
    found = all_operators()[name].evaluate(*sample.operands, **sample.attributes)
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def check(name: str, sample: Sample, opset: int) -> None:
    """Write it, run it in onnxruntime, and read it back."""
    results = evaluated(name, sample)
    graph = replaced(name, sample, results, opset)
    changes = find_changes(graph.metadata["onnx_imported"], graph)
    model = onnx_ir.to_proto(patched_model(graph, changes)[0])
    onnx.checker.check_model(model, full_check=True)
    x = next((x for x in sample.operands if isinstance(x, torch.Tensor)), torch.zeros(2))
    found = runtime_outputs(model, {"x": x.numpy()})
    back = run(load(model), [x])
    for expected, ours, read in zip(results, found, back, strict=True):
        options: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5, "equal_nan": True}
        torch.testing.assert_close(torch.from_numpy(np.asarray(ours)), expected, **options)
        torch.testing.assert_close(read, expected, **options)


def _is(operand: Any) -> bool:
    return isinstance(operand, torch.Tensor)


@pytest.mark.parametrize("name", sorted(SPELLED))
def test_spelled_operator_computes_what_the_record_does(name: str) -> None:
    refused = []
    for opset in OPSETS:
        torch.manual_seed(0)
        for index, sample in enumerate(SPELLED[name].samples()):  # type: ignore[misc]
            if any(tensor.dtype in FLOATS for tensor in (*sample.operands, *evaluated(name, sample)) if _is(tensor)):
                continue  # numpy has none of them: tests/passes/quantization/test_formats.py runs files with them
            try:
                check(name, sample, opset)
            except EmitError as error:
                assert "cannot be written to ONNX" in str(error)
                refused.append((opset, index, str(error)))
    assert len(refused) == REFUSED.get(name, 0), refused
