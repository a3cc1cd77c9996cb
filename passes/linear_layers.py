"""Products by transposed weights as linear layers, for passes that work on layers."""

from __future__ import annotations

from regauge.ir.graph import Graph, Parameter


def linear_layers(graph: Graph) -> Graph:
    """The graph with ``x @ w.t()`` as linear layers of the same weights; the graph itself where it has none."""
    if not any(node.op == "permute" and isinstance(node.inputs[0], Parameter) for node in graph.nodes):
        return graph
    from regauge.ir.rewriting.rewrite import RuleSet, rewrite_graph
    from regauge.passes.simplify.assemble_linear import linear_of_transpose

    result = graph.copy()
    if not rewrite_graph(result, RuleSet([linear_of_transpose])).total:
        return graph
    return result
