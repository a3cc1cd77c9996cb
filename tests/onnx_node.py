"""One ONNX node as a model of its own: what Regauge reads it as, checked against onnxruntime."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

from regauge.frontends.from_onnx import load
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run

generator = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return generator.standard_normal(shape).astype(np.float32)


def node_model(
    op: str, inputs: Sequence[Any], opset: int, constants: Collection[int], domain: str, results: int, **attributes: Any
) -> onnx.ModelProto:
    """A model of one node; inputs named in ``constants`` are initializers, None is an absent input."""
    names = ["" if array is None else f"input{i}" for i, array in enumerate(inputs)]
    given = {name: np.asarray(array) for name, array in zip(names, inputs, strict=True) if name}
    fixed = {f"input{i}" for i in constants}
    outputs = [f"result{i}" for i in range(results)]
    graph = helper.make_graph(
        [helper.make_node(op, names, outputs, domain=domain, **attributes)],
        "node",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in given.items()
            if name not in fixed
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in given.items() if name in fixed],
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=8 if opset < 21 else 10)


def check_node(
    op: str,
    inputs: Sequence[Any],
    *,
    opset: int = 17,
    constants: Collection[int] = (),
    domain: str = "",
    results: int = 1,
    **attributes: Any,
) -> Graph:
    """Load the node, run it, and compare with onnxruntime; returns the graph."""
    model = node_model(op, inputs, opset, constants, domain, results, **attributes)
    feed = {value.name: np.asarray(inputs[int(value.name.removeprefix("input"))]) for value in model.graph.input}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = session.run(None, feed)
    for output, array in zip(model.graph.output, expected, strict=True):
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        output.CopyFrom(helper.make_tensor_value_info(output.name, dtype, array.shape))
    graph = load(model)
    actual = run(graph, [torch.from_numpy(feed[value.name]) for value in graph.inputs])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, torch.from_numpy(np.asarray(b)), rtol=1e-4, atol=2e-5, equal_nan=True)
    return graph


def operators(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]
