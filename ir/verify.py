"""Structural verification: is this a graph? Run after every pass; linear in the size of the graph."""

from __future__ import annotations

from collections.abc import Iterator

from regauge.ir.errors import GraphError, RegaugeError
from regauge.ir.graph import Graph, Node, Value


def verify(graph: Graph, *, axes: bool = False) -> None:
    """Raise GraphError with every fault found, each naming its node and what is wrong.

    Checked: unique names, operands defined and of this graph, uses consistent both ways, attributes and operand counts
    as the operator's signature says, regions well formed, no cycle; with ``axes`` also that every axis rule fits and
    gives the recorded shapes.
    """
    faults = list(_faults(graph))
    if axes and not faults:
        faults += graph.axes.problems
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise GraphError(f"graph {graph.name!r} is malformed: " + "; ".join(faults[:5]) + more)


def _faults(graph: Graph) -> Iterator[str]:
    try:
        nodes = graph.nodes
    except GraphError as error:
        yield str(error)
        return
    known: set[Value] = {*graph.inputs, *graph.parameters.values()}
    yield from _name_faults(graph)
    for node in nodes:
        yield from _node_faults(node, known)
        known.update(node.outputs)
    for output in graph.outputs:
        if isinstance(output, Value) and output not in known:
            yield f"the output {output} is not computed in the graph"
    for state in graph.states:
        for value in (state.before, state.after):
            if value not in known:
                yield f"the state {state.name!r} refers to {value}, which is not in the graph"
        if state.returned and not any(output is state.after for output in graph.outputs):
            yield f"the state {state.name!r} is returned, but {state.after} is no output"


def _name_faults(graph: Graph) -> Iterator[str]:
    seen: set[str] = set()
    for value in graph.values():
        if value.name in seen:
            yield f"two values are called %{value.name}"
        seen.add(value.name)
    for name, parameter in graph.parameters.items():
        if parameter.name != name:
            yield f"the parameter {parameter.name!r} is listed as {name!r}"
        if tuple(parameter.weight.shape) != parameter.shape:
            yield f"the parameter {name!r} has the shape {parameter.shape}, its data {tuple(parameter.weight.shape)}"


def _node_faults(node: Node, known: set[Value]) -> Iterator[str]:
    try:
        node.operator.bind(node.inputs, node.attributes)
    except RegaugeError as error:
        yield f"{node.label}: {error}"
    for slot, value in node.operands():
        if value not in known:
            yield f"{node.label} reads {value}, which is not defined before it"
        if (node, slot) not in value.uses:
            yield f"{node.label} reads {value} in slot {slot}, but the value does not list that use"
    for index, value in enumerate(node.outputs):
        if value.producer is not node or value.index != index:
            yield f"{node.label}: its result {value} names another producer"
        for user, slot in value.uses:
            if slot >= len(user.inputs) or user.inputs[slot] is not value:
                yield f"{value} lists a use by {user.label} in slot {slot} that does not exist"
    for region in node.regions:
        yield from (f"{node.label}, region {region.name}: {fault}" for fault in _faults(region))
