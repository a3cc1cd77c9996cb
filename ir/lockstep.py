"""Running a graph on several batches side by side, node by node.

What a node is fed can be looked at, and its weights can be changed, before it runs on any of the batches; so a pass
sees each layer's inputs as the layers before it, already changed, give them, in a single run of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch

from regauge.ir.graph import Graph, Node, Value
from regauge.ir.interpret import Interpreter, last_uses


class Lockstep:
    """One run of a graph on all batches; memory holds the values that are still to be read, of every batch.

    for node in run.steps():        # in the order in which the nodes run
        run.values(node.inputs[0])  # one tensor for each batch
        run.execute(node)           # else it runs when the next step is asked for
    """

    def __init__(self, graph: Graph, batches: Sequence[Sequence[Any] | Mapping[str, Any]]) -> None:
        self.graph = graph
        self._interpreter = Interpreter(graph)
        self._environments: list[dict[Value, Any]] = []
        self._bindings: list[dict[sympy.Symbol, int]] = []
        for batch in batches:
            environment, bindings = self._interpreter.bound(batch)
            self._environments.append(environment)
            self._bindings.append(bindings)
        self._last_uses = last_uses(graph)
        self._done: Node | None = None

    def __len__(self) -> int:
        return len(self._environments)

    def steps(self) -> Iterator[Node]:
        """The nodes, each before it runs; what nothing reads any more is dropped behind it."""
        for step, node in enumerate(self.graph.nodes):
            yield node
            self.execute(node)
            for value in self._last_uses.get(step, ()):
                for environment in self._environments:
                    environment.pop(value, None)

    def execute(self, node: Node) -> None:
        """Run a node now, on every batch; once."""
        if self._done is node:
            return
        self._done = node
        with torch.no_grad():
            for environment, bindings in zip(self._environments, self._bindings, strict=True):
                results = self._interpreter.run_node(node, environment, bindings)
                environment.update(zip(node.outputs, results, strict=True))

    def values(self, operand: Any) -> list[Any]:
        """An operand of a node that has not run yet, or a result of one that has, for each batch."""
        pairs = zip(self._environments, self._bindings, strict=True)
        return [self._interpreter.read(operand, environment, bindings) for environment, bindings in pairs]

    def holds(self, value: Value) -> bool:
        """Whether a value has been computed and not been dropped yet."""
        return all(value in environment for environment in self._environments)
