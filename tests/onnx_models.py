"""Small ONNX models with random weights, written in ONNX's text form, and how to prune and to mask them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from regauge.ir.dims.groups import free_groups
from regauge.ir.dims.kept import flat_indices
from regauge.ir.dims.resize import resize
from regauge.ir.graph import Graph

PERCEPTRON = """
<ir_version: 8, opset_import: ["" : 17], producer_name: "somebody", doc_string: "a model">
perceptron (float[batch, 6] x, float[2] unused) => (float[batch, 3] y) <float[batch, 8] h> {
  h = Gemm <transB = 1> (x, w1, b1)
  [relu] r = Relu (h)
  y = Gemm <transB = 1> (r, w2, b2)
}
"""
PERCEPTRON_WEIGHTS = {"w1": (8, 6), "b1": (8,), "w2": (3, 8), "b2": (3,)}

NETWORK = """
<ir_version: 8, opset_import: ["" : 17]>
network (float[batch, 3, 8, 8] x) => (float[batch, 5] y) {
  c1 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k1, a1)
  r1 = Relu (c1)
  c2 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 4> (r1, k2)
  s = Add (r1, c2)
  p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (s)
  shape = Constant <value = int64[2] {-1, 128}> ()
  f = Reshape (p, shape)
  y = Gemm <transB = 1> (f, w, b)
}
"""
NETWORK_WEIGHTS = {"k1": (8, 3, 3, 3), "a1": (8,), "k2": (8, 2, 3, 3), "w": (5, 128), "b": (5,)}

ATTENTION = """
<ir_version: 8, opset_import: ["" : 17]>
attention (float[batch, time, 12] x) => (float[batch, time, 12] y) {
  q = MatMul (x, wq)
  k = MatMul (x, wk)
  v = MatMul (x, wv)
  zero = Constant <value = int64[1] {0}> ()
  one = Constant <value = int64[1] {1}> ()
  two = Constant <value = int64[1] {2}> ()
  three = Constant <value = int64[1] {3}> ()
  heads = Constant <value = int64[1] {3}> ()
  qs = Shape (q)
  qb = Gather (qs, zero)
  qt = Gather (qs, one)
  qw = Gather (qs, two)
  width = Div (qw, heads)
  split = Concat <axis = 0> (qb, qt, heads, width)
  q4 = Reshape (q, split)
  k4 = Reshape (k, split)
  v4 = Reshape (v, split)
  qh = Transpose <perm = [0, 2, 1, 3]> (q4)
  kh = Transpose <perm = [0, 2, 3, 1]> (k4)
  vh = Transpose <perm = [0, 2, 1, 3]> (v4)
  hs = Shape (qh)
  d = Gather (hs, three)
  df = Cast <to = 1> (d)
  scale = Sqrt (df)
  scores = MatMul (qh, kh)
  scaled = Div (scores, scale)
  weights = Softmax <axis = -1> (scaled)
  mixed = MatMul (weights, vh)
  back = Transpose <perm = [0, 2, 1, 3]> (mixed)
  merged = Concat <axis = 0> (qb, qt, qw)
  flat = Reshape (back, merged)
  y = MatMul (flat, wo)
}
"""
ATTENTION_WEIGHTS = {"wq": (12, 12), "wk": (12, 12), "wv": (12, 12), "wo": (12, 12)}


def model_of(text: str, weights: Mapping[str, Sequence[int]], seed: int = 0) -> onnx.ModelProto:
    """A model from its text, with normal weights as initializers."""
    model = onnx.parser.parse_model(text)
    generator = np.random.default_rng(seed)
    for name, shape in weights.items():
        array = generator.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    return model


def save(model: onnx.ModelProto, path: Path, **options: Any) -> Path:
    """Write a model the usual way; with ``save_as_external_data=True`` its weights go beside it."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    onnx.save(copied, path, **options)
    return path


def halves(graph: Graph) -> dict[Any, range]:
    """Every second index of every free Dim."""
    return {group.dim: range(0, group.size, 2) for group in free_groups(graph)}


def pruned(graph: Graph, keep: Mapping[Any, range] | None = None) -> Graph:
    return resize(graph, halves(graph) if keep is None else keep, by="prune")


def masked(model: onnx.ModelProto, graph: Graph, keep: Mapping[Any, range]) -> onnx.ModelProto:
    """A copy of ``model`` with zeros wherever pruning ``graph``, loaded from it, removes an entry of an initializer."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    kept = {dim: np.asarray(list(indices)) for dim, indices in keep.items()}
    for initializer in copied.graph.initializer:
        parameter = graph.parameters.get(initializer.name)
        if parameter is None:
            continue
        array = numpy_helper.to_array(initializer).copy()
        for axis, extent in enumerate(graph.axes.of[parameter]):
            mask = np.zeros(array.shape[axis], dtype=bool)
            mask[flat_indices(extent, kept)] = True
            array *= mask.reshape([-1 if i == axis else 1 for i in range(array.ndim)]).astype(array.dtype)
        initializer.CopyFrom(numpy_helper.from_array(array, initializer.name))
    return copied
