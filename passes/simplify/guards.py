"""Weights of attention without NaN as one operator, in ONNX files.

    Where (IsNaN (p), 0, p)     ThresholdedRelu <alpha = 0> (p)     p: Softmax (scores)

A softmax of a row that is masked as a whole is NaN, which torch's exporter turns into zero, as torch's attention has
it. Weights are never negative, so that what is more than zero stays and all else is zero, NaN too: the same numbers to
the last bit, in one pass over the weights instead of two.
"""

from __future__ import annotations

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.ops.onnx_threshold import RUN_WHOLE, THRESHOLDED_SINCE
from regauge.ir.rewriting.matcher import number_of
from regauge.passes.simplify.constants import is_part
from regauge.passes.simplify.limits import Limits, held_values, scopes


def threshold_weights(graph: Graph, limits: Limits) -> int:
    """Write zeros in the place of NaN behind a softmax as a threshold, in a graph that was loaded from ONNX."""
    model = graph.metadata.get("onnx")
    if model is None or model.opset_imports.get("", 1) < THRESHOLDED_SINCE:
        return 0
    return sum(_threshold_scope(owner, build) for owner, build in scopes(graph))


def _threshold_scope(graph: Graph, build: Builder) -> int:
    held, count = held_values(graph), 0
    build.by = "guards"
    for node in list(graph.nodes):
        weights = _guarded(node) if node.op == "where" else None
        if weights is None or node.output in held:
            continue
        guard, made = node.inputs[0], weights.producer
        assert isinstance(guard, Value) and guard.producer is not None and made is not None
        with build.at(node):
            kept = build.thresholded_relu(weights, alpha=0.0)
        kept.producer.metadata["regauge.replaces"] = node.metadata.get("regauge.replaces") or node.name
        replace_uses(graph, node.output, kept)
        remove_node(graph, node)
        if not guard.uses and guard not in held:
            remove_node(graph, guard.producer)
        kept.name = node.output.name
        count += 1
    return count


def _guarded(node: Node) -> Value | None:
    """The result of a softmax that a node gives with zeros in the place of NaN; None where it does something else."""
    condition, zero, weights = node.inputs
    if not isinstance(condition, Value) or not isinstance(weights, Value) or is_fixed(node) or is_part(node):
        return None
    guard, made = condition.producer, weights.producer
    if guard is None or guard.op != "isnan" or guard.inputs[0] is not weights or number_of(zero) != 0:
        return None
    plain = made is not None and made.op == "softmax" and weights.dtype in RUN_WHOLE
    return weights if plain and node.output.dtype == weights.dtype else None
