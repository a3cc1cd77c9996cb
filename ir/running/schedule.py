"""The order in which a graph runs, with what each step makes known, and what is not needed behind it."""

from __future__ import annotations

from typing import NamedTuple

import sympy

from regauge.ir.graph import Graph, Node, Value


class Step(NamedTuple):
    """One node of a run."""

    node: Node
    late: tuple[Value, ...]  # its results whose shapes hold sizes that no input fixes, as the hits of a ``nonzero``
    last: tuple[Value, ...]  # values that nothing reads behind it: a run holds no more tensors than it needs


def schedule(graph: Graph) -> list[Step]:
    """The steps of a run of the graph, which are kept until it is another one."""
    now = (graph.version, *graph.outputs, *graph.states)  # lists of these are put in place by assignment, too
    if graph._schedule is None or graph._schedule[0] != now:
        graph._schedule = (now, schedule_now(graph))
    return graph._schedule[1]


def schedule_now(graph: Graph) -> list[Step]:
    """The steps of a run, found anew: nodes of regions are edited by way of the graph around them."""
    known = {size for value in graph.inputs for size in value.shape}
    last = _last_uses(graph)
    steps = []
    for place, node in enumerate(graph.nodes):
        late = (v for v in node.outputs if any(isinstance(size, sympy.Symbol) for size in set(v.shape) - known))
        steps.append(Step(node, tuple(late), tuple(last.get(place, ()))))
    return steps


def _last_uses(graph: Graph) -> dict[int, list[Value]]:
    position = {node: step for step, node in enumerate(graph.nodes)}
    protected = {o for o in graph.outputs if isinstance(o, Value)} | {s.after for s in graph.states}
    result: dict[int, list[Value]] = {}
    for node in graph.nodes:
        for value in node.outputs:
            if value not in protected:
                steps = [position[user] for user, _ in value.uses if user in position]
                result.setdefault(max(steps, default=position[node]), []).append(value)
    return result
