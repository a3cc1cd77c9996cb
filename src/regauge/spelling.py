"""Whether an operator that can be written to ONNX is written as what it computes: its samples in onnxruntime.

:func:`regauge.check_operator` asks that of records that say how they are written. A sample is put into a loaded model
in place of zeros, as a pass would; the model is written, run, and read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir
import torch
from onnx import helper

from regauge.backends.onnx_model.changes import find_changes
from regauge.backends.onnx_model.emit import patched_model
from regauge.backends.run_onnxruntime import Session
from regauge.frontends.from_onnx import load
from regauge.ir.edit import Builder, remove_dead, replace_uses
from regauge.ir.errors import EmitError, LawError, blamed_on, first_line
from regauge.ir.graph import Graph
from regauge.ir.laws.cases import samples_of
from regauge.ir.operator import Sample, get_operator
from regauge.ir.running.interpret import run

OPSETS = (13, 17, 21, 23)
KNOWN_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}  # of other operators onnxruntime has no kernels
_RELATIVE, _ABSOLUTE = 1e-4, 2e-5  # in single precision


def check_spelling(name: str) -> None:
    """Check all samples of an operator at several opsets; a spelling may refuse some of them.

    Raises LawError where onnxruntime gives something else or takes no such model, or where every sample is refused, and
    OperatorError where the ``spell`` of the record fails.
    """
    record, written, refused = get_operator(name), False, None
    if record.random:
        return
    for opset in OPSETS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            samples = samples_of(record)
        for index, one in enumerate(samples):
            if any(_lacks_numpy(x) for x in (*one.operands, *evaluated(name, one))):
                continue
            try:
                check_sample(name, index, one, opset)
                written = True
            except EmitError as error:
                refused = refused or error
    if refused is not None and not written:
        raise LawError(f"operator {name}, onnx: no sample of it can be written at opsets {OPSETS}: {refused}")


def check_sample(name: str, index: int, sample: Sample, opset: int) -> None:
    """Write one sample, run it in onnxruntime, and read it back; raises LawError, or EmitError where it is refused."""
    where = f"operator {name}, sample {index}, onnx at opset {opset}"
    results = evaluated(name, sample)
    graph = _replaced(name, sample, results, opset)
    with blamed_on(f"{where}, its spell"):
        model = onnx_ir.to_proto(patched_model(graph, find_changes(graph.metadata["onnx_imported"], graph))[0])
    if {node.domain for node in model.graph.node} - KNOWN_DOMAINS:
        return
    x = next((x for x in sample.operands if isinstance(x, torch.Tensor)), torch.zeros(2))
    try:
        onnx.checker.check_model(model, full_check=True)
        found = Session(model, optimisation="off", threads=1).run({"x": x})
    except Exception as error:  # the checker and onnxruntime raise types of their own
        raise LawError(f"{where}: what is written is no model: {first_line(error)}: correct its spell") from error
    for result, ours, read in zip(results, found, run(load(model), [x]), strict=True):
        for what, actual in (("onnxruntime gives", ours), ("read back it is", read)):
            try:
                torch.testing.assert_close(actual, result, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True)
            except AssertionError as error:
                reason = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
                raise LawError(f"{where}: {what} something else: {reason}: correct its spell") from error


def evaluated(name: str, sample: Sample) -> tuple[torch.Tensor, ...]:
    found = get_operator(name).evaluate(*sample.operands, **sample.attributes)
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _lacks_numpy(operand: Any) -> bool:
    """Floats of 8 bits, which numpy has no type for."""
    return isinstance(operand, torch.Tensor) and operand.is_floating_point() and operand.dtype.itemsize == 1


def _carrier(sample: Sample, results: Sequence[torch.Tensor], opset: int) -> onnx.ModelProto:
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


def _replaced(name: str, sample: Sample, results: Sequence[torch.Tensor], opset: int) -> Graph:
    """The carried graph with its outputs computed by the operator; all its tensors but the first are weights."""
    graph = load(_carrier(sample, results, opset)).copy()
    build, first = Builder(graph, by="check_spelling"), True
    operands: list[Any] = []
    for index, operand in enumerate(sample.operands):
        if isinstance(operand, torch.Tensor) and not first:
            operands.append(build.parameter(f"weight{index}", operand))
        elif isinstance(operand, torch.Tensor):
            operands.append(graph.inputs[0])
            first = False
        else:
            operands.append(operand)
    stated = [(tuple(r.shape), r.dtype) for r in results] if get_operator(name).sized_by_data else None
    made = build(name, *operands, results=stated, **sample.attributes)
    for old, new in zip(list(graph.outputs), made if isinstance(made, tuple) else (made,), strict=True):
        replace_uses(graph, old, new)  # type: ignore[arg-type]
    remove_dead(graph)
    return graph
