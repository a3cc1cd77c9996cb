"""Nested graphs of the carried ONNX model in the place of their node: a branch always taken, a single iteration.

    y = If (true) { then: h = Conv (x, w)  b = Relu (h)   else: ... }         h = Conv (x, w)   y = Relu (h)

Nodes move with what is nested in them, and initializers with them. Names stay where they are unique.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir

from regauge.backends.onnx_model.carrier import Carrier
from regauge.backends.onnx_model.write import graphs_in, subgraphs
from regauge.ir.graph import Graph

NO_ITERATION = -1


def inline_graphs(graph: Graph, inlined: Mapping[Any, int], carrier: Carrier) -> None:
    """Inline what passes inlined and, where the file is folded, the branches that were read in place of their If.

    Such a branch is taken because its condition is known, or was assumed to be taken, which a note on the file says.
    """
    taken = dict(inlined)
    if "control-flow" in graph.metadata.get("onnx_fold", ()):
        taken.update(graph.metadata.get("onnx_branches", {}))
    for origin, index in taken.items():
        node = carrier.nodes.get(origin)
        if node is not None and node.graph is not None and node.graph not in carrier.function_graphs:
            _Inlining(carrier, origin, node).run(index)


class _Inlining:
    """One node with nested graphs, one of which takes its place."""

    def __init__(self, carrier: Carrier, origin: onnx_ir.Node, node: onnx_ir.Node) -> None:
        assert node.graph is not None
        self.carrier = carrier
        self.origin = origin
        self.node = node
        self.place = node.graph

    def run(self, index: int) -> None:
        body = None if index == NO_ITERATION else nested_graphs(self.node)[index]
        for name, attribute in list(self.node.attributes.items()):
            for other in subgraphs(attribute):
                if other is not body:
                    self.carrier.forget(other)
                    self.node.attributes.pop(name)
        if body is None:
            results: Sequence[Any] = self.node.inputs[2:]
        else:
            results = self._move(body)
        for declared, result in zip(self.node.outputs, results, strict=False):
            self._replace(declared, result)
        read = list(self.node.inputs)
        del self.carrier.nodes[self.origin]
        self.carrier.remove(self.node)
        self.carrier.drop_unused(read)

    def _move(self, body: onnx_ir.Graph) -> Sequence[Any]:
        """Put the nodes and initializers of the body in front of the node; returns what its results are there."""
        actuals = self._actuals(body)
        for formal, actual in actuals.items():
            self.carrier.redirect(formal, actual)
            self.carrier.stand_in(formal, actual)
        results = [actuals.get(value, value) for value in body.outputs]
        body.outputs.clear()
        for value in list(body.initializers.values()):
            self.carrier.move_initializer(value, self.place)
        for inner in list(body):
            body.remove(inner)
            self.place.insert_before(self.node, inner)
            for value in inner.outputs:
                self.carrier.make_unique(value)
        return results[1:] if self.node.op_type == "Loop" else results

    def _actuals(self, body: onnx_ir.Graph) -> dict[onnx_ir.Value, onnx_ir.Value]:
        """What the inputs of the body stand for in its only iteration."""
        if not body.inputs:
            return {}
        iteration = self.carrier.insert_constant(self.node, np.array(0, dtype=np.int64), "iteration")
        going = self.carrier.insert_constant(self.node, np.array(True), "condition")
        given = [iteration, going, *(value for value in self.node.inputs[2:] if value is not None)]
        return dict(zip(body.inputs, given, strict=True))

    def _replace(self, declared: onnx_ir.Value, result: onnx_ir.Value) -> None:
        self.carrier.redirect(declared, result)
        for slot, output in enumerate(self.place.outputs):
            if output is declared:
                result = self.carrier.give_output(self.place, slot, result, rename=True)
        self.carrier.stand_in(declared, result)


def nested_graphs(node: onnx_ir.Node) -> list[onnx_ir.Graph]:
    """The graphs nested in a node, in the order of our regions: of an If the branch for true comes first."""
    if node.op_type == "If" and {"then_branch", "else_branch"} <= set(node.attributes):
        return [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    return graphs_in(node)
