"""Stacks of matrices, as those of experts, that a permute turns around for the product: stored as the product reads.

grouped_mm(x, permute(w), ends)    w: [experts, outputs, inputs]
grouped_mm(x, w', ends)            w': [experts, inputs, outputs]
"""

from __future__ import annotations

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Parameter
from regauge.ir.storage.weight_edits import settle_successors

_PRODUCTS = ("matmul", "grouped_mm")


def as_read(graph: Graph, *, by: str) -> Graph:
    """A copy of the graph with its stacks so; the graph itself where there are none."""
    if not any(map(_turns_stack, graph.nodes)):
        return graph
    result = graph.copy()
    build = Builder(result, by=by)
    for node in [node for node in result.nodes if _turns_stack(node)]:
        weight = node.inputs[0]
        assert isinstance(weight, Parameter)
        shape = [int(size) for size in node.output.shape]
        new = build.folded(weight, lambda tensor: tensor.mT, shape=shape)
        replace_uses(result, node.output, new)
        remove_node(result, node)
        settle_successors(result, build)
    return result


def _turns_stack(node: Node) -> bool:
    if node.op != "permute" or tuple(node.attributes["dims"]) not in ((0, 2, 1), (0, -1, -2), (-3, -1, -2)):
        return False
    weight = node.inputs[0]
    if not isinstance(weight, Parameter) or weight.kind != "parameter" or weight.rank != 3 or len(weight.uses) != 1:
        return False
    return all(reader.op in _PRODUCTS and slot == 1 for reader, slot in node.output.uses) and len(node.output.uses) == 1
