"""Running a graph on several batches side by side, node by node.

What a node is fed can be looked at, and its weights can be changed, before it runs on any of the batches; so a pass
sees each layer's inputs as the layers before it, already changed, give them, in a single run of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch

from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.memory.mapped import can_be_stored
from regauge.ir.memory.set_aside import Environment, Loaded, SetAside
from regauge.ir.running.interpret import Interpreter
from regauge.ir.running.schedule import schedule
from regauge.ir.sizes.expressions import solve_bindings

HELD = 1 << 27  # bytes of values that are held in memory; what is more goes into temporary files
_SMALL = 1 << 17  # values below so many bytes stay in memory

Watcher = Callable[[Node, list[Any], tuple[Any, ...]], None]
"""Called with a node inside a region, its operands and its results, each time that it runs."""


class _Watched(Interpreter):
    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.watchers: dict[Node, Watcher] = {}

    def run_node(self, node: Node, environment: dict[Value, Any], bindings: dict[sympy.Symbol, int]) -> tuple[Any, ...]:
        results = super().run_node(node, environment, bindings)
        if node in self.watchers:
            self.watchers[node](node, [self.read(o, environment, bindings) for o in node.inputs], results)
        return results


class Lockstep:
    """One run of a graph on all batches; it holds the values that are still to be read, of every batch.

    for node in run.steps():        # in the order in which the nodes run
        run.values(node.inputs[0])  # one tensor for each batch
        run.execute(node)           # else it runs when the next step is asked for

    Memory: :data:`HELD` bytes of values; more of them lie in temporary files, and one batch's are read at a time.
    """

    def __init__(self, graph: Graph, batches: Sequence[Sequence[Any] | Mapping[str, Any]]) -> None:
        self.graph = graph
        self._interpreter = _Watched(graph)
        self._environments: list[Environment] = []
        self._bindings: list[dict[sympy.Symbol, int]] = []
        for batch in batches:
            environment, bindings = self._interpreter.bound(batch)
            self._environments.append(Environment(environment))
            self._bindings.append(bindings)
        self._late = {step.node: step.late for step in schedule(graph)}
        self._held: dict[tuple[int, Value], int] = {}
        self._done: Node | None = None

    def __len__(self) -> int:
        return len(self._environments)

    def steps(self) -> Iterator[Node]:
        """The nodes, each before it runs; what nothing reads any more is dropped behind it."""
        for node, _, last in schedule(self.graph):
            yield node
            self.execute(node)
            for value in last:
                for place, environment in enumerate(self._environments):
                    environment.pop(value, None)
                    self._held.pop((place, value), None)

    def execute(self, node: Node) -> None:
        """Run a node now, on every batch; once."""
        if self._done is node:
            return
        self._done = node
        with torch.no_grad(), self._loaded(node):
            for place, (environment, bindings) in enumerate(zip(self._environments, self._bindings, strict=True)):
                results = self._interpreter.run_node(node, environment, bindings)
                for value, result in zip(node.outputs, results, strict=True):
                    environment[value] = self._kept(place, value, result)
                for value in self._late.get(node, ()):
                    solve_bindings(value.shape, environment[value].shape, bindings)

    def rerun(self, node: Node) -> None:
        """Run a node again, where its results are still held: a weight that it reads has changed."""
        done, self._done = self._done, None
        if all(self.holds(value) for value in node.outputs):
            self.execute(node)
        self._done = done

    def watch(self, watchers: Mapping[Node, Watcher]) -> None:
        """Call these whenever their nodes, which lie in regions, have run."""
        self._interpreter.watchers.update(watchers)

    def calls(self, node: Node, inner: Node) -> list[list[tuple[list[Any], tuple[Any, ...]]]]:
        """Operands and results of a node in a region of ``node``, for each batch and each time that it would run.

        ``node`` has not run yet, and still has to: its results are not kept.
        """
        found: list[list[tuple[list[Any], tuple[Any, ...]]]] = []
        self._interpreter.watchers[inner] = lambda _, operands, results: found[-1].append((operands, results))
        with torch.no_grad():
            for environment, bindings in zip(self._environments, self._bindings, strict=True):
                found.append([])
                self._interpreter.run_node(node, environment, dict(bindings))
        del self._interpreter.watchers[inner]
        return found

    def values(self, operand: Any) -> Sequence[Any]:
        """An operand of a node that has not run yet, or a result of one that has, for each batch.

        Those of batches that lie in files are read when they are asked for.
        """
        pairs = zip(self._environments, self._bindings, strict=True)
        if isinstance(operand, Value) and all(operand in environment for environment in self._environments):
            return Loaded([environment.held(operand) for environment in self._environments])
        return [self._interpreter.read(operand, environment, bindings) for environment, bindings in pairs]

    def holds(self, value: Value) -> bool:
        """Whether a value has been computed and not been dropped yet."""
        return all(value in environment for environment in self._environments)

    def _kept(self, place: int, value: Value, result: Any) -> Any:
        """A result as it is held: in memory as long as there is room."""
        if not can_be_stored(result) or result.nbytes < _SMALL:
            return result
        if sum(self._held.values()) + result.nbytes > HELD:
            return SetAside(result)
        self._held[place, value] = result.nbytes
        return result

    def _loaded(self, node: Node) -> _Loaded:
        return _Loaded(self._interpreter, node if len(self._environments) > 1 else None)


class _Loaded:
    """While it is entered, weights of a node that are cut when they are read have been read, once for all batches."""

    def __init__(self, interpreter: Interpreter, node: Node | None) -> None:
        self.interpreter, self.node = interpreter, node

    def __enter__(self) -> None:
        for _, value in self.node.operands() if self.node is not None else ():
            if isinstance(value, Parameter):
                self.interpreter.weights[value.name] = value.tensor

    def __exit__(self, *_: object) -> None:
        self.interpreter.weights.clear()
