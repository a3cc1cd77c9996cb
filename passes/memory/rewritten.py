"""The graph of a schedule: its nodes in that order, with copies of those that run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from regauge.ir.edit import Builder, set_input
from regauge.ir.folding.purity import RECOMPUTED
from regauge.ir.graph import Graph, Node, Operand, Value
from regauge.ir.graph_copy import copy_graph
from regauge.ir.memory.activations import returned
from regauge.ir.node_order import IN_ORDER
from regauge.passes.memory.schedule import Schedule, Work


def scheduled(work: Work, order: Schedule, by: str) -> Graph:
    """A copy of the graph that runs the tasks as the schedule says; what runs again is marked, and says what it is.

    What runs again belongs to the module of the next node that runs for the first time: it is computed for that.
    """
    writer = _Writer(work, by)
    steps = [work.tasks[number].node for number in order]
    first = {node: place for place, node in reversed(list(enumerate(steps)))}
    readers, reader = list[Node](), steps[-1] if steps else None
    for place, node in reversed(list(enumerate(steps))):
        reader = node if first[node] == place else reader
        assert reader is not None
        readers.append(reader)
    for node, reads in zip(steps, reversed(readers), strict=True):
        writer.run(node, reads)
    return writer.finish()


class _Writer:
    def __init__(self, work: Work, by: str) -> None:
        self.work = work
        self.of: dict[Value, Value] = {}  # what a value of the original graph is at this point of the new one
        self.graph = copy_graph(work.graph, self.of)
        self.first = dict(self.of)
        self.node = dict(zip(work.graph.nodes, list(self.graph._nodes), strict=True))
        self.build = Builder(self.graph, by=by)
        self.order: dict[Node, None] = {}
        self.shown: dict[Node, Value] = {}  # of nodes that give views, what these are views of

    def run(self, node: Node, reader: Node) -> None:
        """Place a node, or where it is placed already a copy of it beside ``reader``."""
        given = [self._now(operand, reader) for operand in node.inputs]
        for value in self.work.read_around(node):
            self._now(value, reader)
        self._place(node, given, reader)

    def _place(self, node: Node, given: Sequence[Operand], reader: Node) -> None:
        own = self.node[node]
        if own not in self.order:
            for slot, operand in enumerate(given):
                if operand is not own.inputs[slot]:
                    set_input(own, slot, operand, self.graph)
            self.order[own] = None
            return
        results = [(value.shape, value.dtype) for value in node.outputs]
        with self.build.at(own):
            self.build.scope = reader.scope
            self.build(node.op, *given, name=node.name, results=results, **node.attributes)
        copied = self.build.added[-1]
        copied.metadata = {**own.metadata, **copied.metadata, RECOMPUTED: node.name}
        self.order[copied] = None
        self.of.update(zip(node.outputs, copied.outputs, strict=True))

    def _now(self, operand: Operand, reader: Node) -> Operand:
        """An operand as it was computed last; a view of it is made anew where that is not what it shows."""
        if not isinstance(operand, Value):
            return operand
        node = operand.producer
        if node is not None and node in self.node and self.work.is_view(node):
            given = [self._now(entry, reader) for entry in node.inputs]
            (shown,) = (entry for entry in given if isinstance(entry, Value))
            if self.shown.get(node) is not shown:
                self.shown[node] = shown
                self._place(node, given, reader)
        return self.of.get(operand, operand)

    def finish(self) -> Graph:
        """The graph, with results and new states as they were computed last, under the names that they had."""
        graph, work = self.graph, self.work.graph
        last = work.nodes[-1]
        graph.outputs = [self._now(output, last) for output in work.outputs]
        for state in work.states:
            self._now(state.after, last)
        graph.states = [
            replace(new, after=self.of[old.after]) for old, new in zip(work.states, graph.states, strict=True)
        ]
        for old in dict.fromkeys(returned(work)):
            one, other = self.of[old], self.first[old]
            one.name, other.name = other.name, one.name
        graph._nodes = dict(self.order)
        graph.version += 1
        graph.metadata[IN_ORDER] = True
        return graph
