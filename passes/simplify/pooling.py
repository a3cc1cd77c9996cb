"""Means over the two axes of images, written as global pools in ONNX files.

    ReduceMean (x, axes = 2, 3)     GlobalAveragePool (x)

Runtimes lay images out in blocks of channels between convolutions; pools they compute in that layout, reductions not:
there every one costs a way back. The same numbers but for the order of a sum.
"""

from __future__ import annotations

import torch

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Graph, Node, Value
from regauge.passes.simplify.constants import is_part
from regauge.passes.simplify.limits import Limits, held_values, scopes

_IMAGE_OPERATORS = frozenset({"conv", "conv_transpose", "max_pool", "avg_pool", "batch_norm", "concat", "interpolate"})
_SHORT = 8  # pointwise operators in a row between what gives an image and its mean


def pool_means(graph: Graph, limits: Limits) -> int:
    """Write means over the axes of images as global pools, in a graph that was loaded from ONNX; returns how many."""
    if "onnx" not in graph.metadata:
        return 0
    return sum(_pool_scope(owner, build) for owner, build in scopes(graph))


def _pool_scope(graph: Graph, build: Builder) -> int:
    held, count = held_values(graph), 0
    for node in list(graph.nodes):
        if node.op == "mean" and node.output not in held and _is_pool(node):
            with build.at(node):
                pooled = build.adaptive_avg_pool(node.inputs[0], output_size=(1, 1))
            pooled.producer.metadata["regauge.replaces"] = node.metadata.get("regauge.replaces") or node.name
            replace_uses(graph, node.output, pooled)
            remove_node(graph, node)
            pooled.name = node.output.name
            count += 1
    return count


def _is_pool(node: Node) -> bool:
    x, dims = node.inputs[0], node.attributes["dims"]
    if is_fixed(node) or is_part(node) or not isinstance(x, Value) or x.rank != 4 or x.dtype != torch.float32:
        return False
    plain = node.output.dtype == x.dtype and node.attributes["keepdim"] and dims is not None
    return plain and sorted(dim % 4 for dim in dims) == [2, 3] and image_source(x) is not None


def image_source(value: Value) -> Node | None:
    """The operator of images that a value comes from, with nothing but pointwise ones in between; None without one."""
    for _ in range(_SHORT):
        node = value.producer
        if node is None or node.op in _IMAGE_OPERATORS:
            return node
        images = [operand for _, operand in node.operands() if operand.shape == value.shape]
        if not images or len(node.outputs) != 1 or node.output.shape != value.shape:
            return None
        value = images[0]
    return None
