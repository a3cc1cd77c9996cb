"""Taking parts out of a graph."""

from __future__ import annotations

from collections.abc import Iterable

from regauge.ir.edit import dead_nodes, record, remove_dead, remove_parameter, replace_uses
from regauge.ir.graph import Graph, Value
from regauge.ir.graph_copy import copy_graph
from regauge.passes.depth.parts import Order, Part

IDEMPOTENT = ("relu",)  # what a removal may leave twice in a row: relu(x + f(x)) becomes relu(x) of x = relu(...)


def removable(order: Order, part: Part) -> str | None:
    """Why a part has to stay, or None: a result of the graph must remain a value of its own, under its name."""
    if part.result not in order.held:
        return None
    if any(part.result in (state.before, state.after) for state in order.graph.states):
        return "its result is a state"
    if part.source.producer is None or len(part.source.producer.outputs) != 1 or part.source in order.held:
        return "its result is an output, and so is what it starts from, or that is an input"
    return None


def without(graph: Graph, parts: Iterable[Part], *, by: str) -> tuple[Graph, dict[Value, Value]]:
    """A copy of a graph without parts, which are parts of ``graph``; and for each value of ``graph`` what it is there.

    The result of a part is its source there. Values that are gone have no entry.
    """
    moved: dict[Value, Value] = {}
    result = copy_graph(graph, moved)
    known = {new: old for old, new in moved.items()}
    position = {node: place for place, node in enumerate(graph.nodes)}
    for part in sorted(parts, key=lambda part: position[part.nodes[-1]]):
        old, new = moved[part.result], moved[part.source]
        if old is new:
            continue
        _skip(result, old, new)
        moved[part.result] = new
        for repeated in _repeated(result, new):
            replace_uses(result, repeated, new)
            moved[known[repeated]] = new
        record(result, by, f"{part.name}: removed")
    remove_dead(result, keep={node.name for node in dead_nodes(graph)})
    _forget_modules(graph, result, by)
    live = set(result.values())
    return result, {old: new for old, new in moved.items() if new in live}


def _forget_modules(graph: Graph, result: Graph, by: str) -> None:
    """Remove what nothing reads of modules that are gone: a batch norm counts its batches in a buffer of its own."""
    gone = {_module(name) for name in graph.parameters.keys() - result.parameters.keys()}
    gone -= {_module(name) for name, parameter in result.parameters.items() if parameter.was_read}
    for name, parameter in list(result.parameters.items()):
        is_output = any(output is parameter for output in result.outputs)
        if _module(name) in gone - {""} and not parameter.was_read and not is_output:
            remove_parameter(result, parameter, by=by)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _skip(result: Graph, old: Value, new: Value) -> None:
    is_output = any(output is old for output in result.outputs)
    replace_uses(result, old, new)
    if is_output:  # it keeps its name, and the value that takes its place had a name of its own
        old.name, new.name = new.name, old.name
        old.origin, new.origin = new.origin, old.origin


def _repeated(result: Graph, value: Value) -> list[Value]:
    """Of relu(relu(x)) the outer one, where ``value`` is the inner one."""
    node = value.producer
    if node is None or node.op not in IDEMPOTENT:
        return []
    outer = [user.output for user in value.consumers() if user.op == node.op]
    return [found for found in outer if not any(output is found for output in result.outputs)]
