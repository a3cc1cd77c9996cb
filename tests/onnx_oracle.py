"""Loaded graphs against onnxruntime without optimisation, on seeded inputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from regauge.frontends.from_onnx import load
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.ir.sizes.expressions import evaluate


def runtime_outputs(source: Path | onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    model = str(source) if isinstance(source, Path) else source.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    return list(session.run(None, {name: array for name, array in feeds.items() if name in wanted}))


def draw_inputs(graph: Graph, sizes: Mapping[str, int], high: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal floats, and integers below ``high``, for every input without a default."""
    generator = np.random.default_rng(seed)
    defaults = graph.metadata.get("input_defaults", {})
    feeds = {}
    for value in graph.inputs:
        if value.name in defaults:
            continue
        bindings = {
            s: sizes.get(str(s), 3) for size in value.shape if not isinstance(size, int) for s in size.free_symbols
        }
        shape = [evaluate(size, bindings) for size in value.shape]
        kind = np.dtype(str(value.dtype).removeprefix("torch."))
        normal = kind.kind == "f"
        drawn = generator.standard_normal(shape) if normal else generator.integers(0, high, shape)
        feeds[value.origin.name] = np.asarray(drawn).astype(kind)
    return feeds


def quietly_loaded(source: Any, **options: Any) -> Graph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(source, **options)


def assert_equals_runtime(
    source: Path | onnx.ModelProto,
    sizes: Mapping[str, int] | None = None,
    *,
    high: int = 40,
    given: Mapping[str, np.ndarray] | None = None,
    tolerance: float = 2e-5,
) -> Graph:
    """Load a model and compare the interpreter with onnxruntime; returns the graph."""
    graph = quietly_loaded(source)
    feeds = {**draw_inputs(graph, sizes or {}, high), **(given or {})}
    expected = runtime_outputs(source, feeds)
    actual = run(graph, {value.name: feeds[value.origin.name] for value in graph.inputs if value.origin.name in feeds})
    for a, b in zip(actual, expected, strict=True):
        if b.dtype.kind in "OUS":
            assert np.array_equal(a, b)
            continue
        b = torch.from_numpy(np.asarray(b))
        scale = float(b.abs().max()) if b.numel() and b.is_floating_point() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(scale, 1e-6), equal_nan=True)
    return graph


def opaque(graph: Graph) -> list[str]:
    """Operators that were kept as they are."""
    return [node.attributes["op_type"] for _, node in graph.walk() if node.op == "onnx_call"]


def free_sizes(graph: Graph) -> list[int]:
    return sorted((group.size for group in graph.groups() if group.free), reverse=True)
