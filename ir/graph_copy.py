"""Copies of graphs: their own nodes and values, and the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from regauge.ir.collection import without_collection
from regauge.ir.graph import Graph, Node, Operand, Parameter, Value, add_use


def copy_graph(graph: Graph, mapping: dict[Value, Value] | None = None) -> Graph:
    """A graph with its own values and nodes that shares weights; ``mapping`` receives old value -> new value."""
    with without_collection():
        return _copy(graph, {} if mapping is None else mapping)


def _copy(graph: Graph, to_new: dict[Value, Value]) -> Graph:
    result = Graph(
        name=graph.name, metadata=dict(graph.metadata), symbols=dict(graph.symbols), history=list(graph.history)
    )
    for value in graph.inputs:
        to_new[value] = Value(name=value.name, shape=value.shape, dtype=value.dtype)
        to_new[value].origin = value.origin
    for name, parameter in graph.parameters.items():
        copied = Parameter(
            name=name,
            weight=parameter.weight,
            kind=parameter.kind,
            aliases=parameter.aliases,
            trainable=parameter.trainable,
            persistent=parameter.persistent,
        )
        copied.origin = parameter.origin
        copied.was_read, copied.stored = parameter.was_read, parameter.stored
        to_new[parameter] = copied
        result.parameters[name] = copied
    result.inputs = [to_new[value] for value in graph.inputs]
    for node in graph.nodes:
        _copy_node(node, result, to_new)
    result.outputs = [_moved(output, to_new) for output in graph.outputs]
    result.states = [replace(s, before=to_new[s.before], after=to_new[s.after]) for s in graph.states]
    return result


def copy_nodes(nodes: Iterable[Node], result: Graph, to_new: dict[Value, Value]) -> None:
    """Copy nodes into another graph; ``to_new`` holds what they read there, and receives their results."""
    for node in nodes:
        _copy_node(node, result, to_new)
    result.version += 1


def _moved(operand: Operand, to_new: Mapping[Value, Value]) -> Operand:
    return to_new[operand] if isinstance(operand, Value) else operand


def _copy_node(node: Node, result: Graph, to_new: dict[Value, Value]) -> None:
    copied = Node(
        op=node.op,
        inputs=[_moved(operand, to_new) for operand in node.inputs],
        attributes=node.attributes,
        scope=node.scope,
        source=node.source,
        regions=[_copy(region, to_new) for region in node.regions],
        origin=node.origin,
    )
    copied.metadata = dict(node.metadata)
    copied.outputs = tuple(
        Value(name=value.name, shape=value.shape, dtype=value.dtype, producer=copied, index=i)
        for i, value in enumerate(node.outputs)
    )
    for old, new in zip(node.outputs, copied.outputs, strict=True):
        new.origin = old.origin
        to_new[old] = new
    for slot, value in copied.operands():
        add_use(value, copied, slot)
    result._nodes[copied] = None
