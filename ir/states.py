"""States that travel through the arguments and results of a graph: caches, and the last frames of a stream.

    input NAME  ->  output NAME.next

A state input stands behind the ordinary inputs, and what it becomes behind the ordinary outputs, in the same order. The
caller hands what it got back in with the next run; a first run starts from zeros (:func:`first_states`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import sympy
import torch

from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph, State, Value
from regauge.ir.sizes.expressions import evaluate, solve_bindings

NEXT = ".next"  # what the name of a state ends in once it is an output


def carry(graph: Graph, before: Value, after: Value, taken: Container[str] | None = None) -> State:
    """Make ``after`` an output that the caller hands in again as the input ``before``; returns the new state.

    Who carries many states gives the names that are ``taken`` in the graph, which are else looked up for each.
    Raises GraphError where ``before`` is no input of the graph, or ``after`` is an output already or not computed here.
    """
    if before not in graph.inputs:
        raise GraphError(f"the state {before} is no input of graph {graph.name!r}: add it with Builder.input")
    if after.producer is None or any(output is after for output in graph.outputs):
        raise GraphError(f"what the state {before} becomes needs a value of its own: {after} is none, add an identity")
    name = before.name + NEXT
    if name not in ({value.name for value in graph.values()} if taken is None else taken):
        after.name = name
    state = State(before.name, before, after, returned=True)
    graph.outputs.append(after)
    graph.states.append(state)
    graph.version += 1
    return state


def carried(graph: Graph) -> list[State]:
    """The states that are inputs and outputs, in the order of the outputs."""
    place = {output: number for number, output in enumerate(graph.outputs) if isinstance(output, Value)}
    return sorted((state for state in graph.states if state.returned), key=lambda state: place[state.after])


PROPERTY = "regauge.states"
"""Of an ONNX file: a list of pairs, the name of an input and that of the output to hand in there with the next run."""


def noted_states(graph: Graph, inputs: Sequence[str | None], outputs: Sequence[str | None]) -> str | None:
    """The carried states as a file's property, by the names that inputs and outputs have there; None without states."""
    place = {value: number for number, value in enumerate(graph.inputs)}
    given = {value: number for number, value in enumerate(graph.outputs) if isinstance(value, Value)}
    pairs = [(inputs[place[state.before]], outputs[given[state.after]]) for state in carried(graph)]
    return json.dumps(pairs) if pairs else None


def take_states(graph: Graph, noted: str | None) -> None:
    """Declare, in place, the states that a file's property tells, where the graph has such inputs and outputs."""
    inputs = {value.name: value for value in graph.inputs}
    outputs = {value.name: value for value in graph.outputs if isinstance(value, Value) and value.producer is not None}
    for pair in _pairs(noted):
        before, after = inputs.get(pair[0]), outputs.get(pair[1])
        if before is not None and after is not None and before.rank == after.rank and before.dtype == after.dtype:
            graph.states.append(State(before.name, before, after, returned=True))


def pair_states(graph: Graph) -> None:
    """Declare, in place, states of a graph that names none: each output, but for the first, goes with the next input,
    but for the first, of its type and sizes; a dynamic size may be any other one.

    A guess by form alone, for files of streams whose answer comes first: look at ``graph.states`` before relying on it.
    """
    free = [value for value in graph.inputs[1:] if not any(state.before is value for state in graph.states)]
    for after in graph.outputs[1:]:
        found = next((before for before in free if isinstance(after, Value) and _alike(before, after)), None)
        if found is not None and isinstance(after, Value) and after.producer is not None:
            free.remove(found)
            graph.states.append(State(found.name, found, after, returned=True))


def _alike(before: Value, after: Value) -> bool:
    if before.dtype != after.dtype or before.rank != after.rank or not before.rank:
        return False
    pairs = zip(before.shape, after.shape, strict=True)
    return all(a == b or not isinstance(a, int) and not isinstance(b, int) for a, b in pairs)


def _pairs(noted: str | None) -> list[tuple[str, str]]:
    """None of a property that others wrote."""
    try:
        found = json.loads(noted) if noted else []
    except ValueError:
        return []
    pairs = found if isinstance(found, list) else []
    return [(p[0], p[1]) for p in pairs if isinstance(p, list) and len(p) == 2 and all(isinstance(n, str) for n in p)]


def forget_origin(graph: Graph) -> None:
    """Say, in place, that arguments and results are no longer those of the module or file that the graph comes from."""
    for key in [key for key in graph.metadata if key.startswith("onnx")]:
        del graph.metadata[key]
    if "torch" in graph.metadata:
        kept = ("root_class", "training")
        graph.metadata["torch"] = {key: value for key, value in graph.metadata["torch"].items() if key in kept}


def first_states(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Zeros for every carried state, in their order; the ordinary ``inputs`` of the first run tell dynamic sizes.

    A cache, which grows from run to run, has no entries yet; other dynamic sizes are those that come back.
    """
    bindings: dict[sympy.Symbol, int] = {}
    for value, tensor in zip(ordinary_inputs(graph), inputs, strict=True):
        solve_bindings(value.shape, tensor.shape, bindings)
    found = []
    for state in carried(graph):
        for before, after in zip(state.before.shape, state.after.shape, strict=True):
            if before != after and isinstance(before, sympy.Symbol):
                known = isinstance(after, sympy.Expr) and after.free_symbols <= bindings.keys()
                bindings.setdefault(before, int(sympy.sympify(after).subs(bindings)) if known else 0)
        dtype = state.before.dtype
        if not isinstance(dtype, torch.dtype):
            raise GraphError(f"the state {state.before} cannot be made of zeros: hand in a first one")
        shape: Any = evaluate(state.before.shape, bindings)
        found.append(torch.zeros(shape, dtype=dtype, device=inputs[0].device if inputs else None))
    return found


def ordinary_inputs(graph: Graph) -> list[Value]:
    """The inputs that are no carried state."""
    states = {state.before for state in graph.states if state.returned}
    return [value for value in graph.inputs if value not in states]


def with_first_states(graph: Graph, inputs: Sequence[Any] | Mapping[str, Any]) -> Sequence[Any] | Mapping[str, Any]:
    """The inputs of a run that begins: :func:`first_states` are added where ``inputs`` are the ordinary ones alone."""
    names = [state.before.name for state in carried(graph)]
    own = [value.name for value in ordinary_inputs(graph)]
    if isinstance(inputs, Mapping):
        alone = all(name in inputs for name in own) and not any(name in inputs for name in names)
    else:
        alone = len(inputs) == len(own)
    if not names or not alone:
        return inputs
    given = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(own, inputs, strict=True))
    first = first_states(graph, [torch.as_tensor(given[name]) for name in own])
    found = {**given, **dict(zip(names, first, strict=True))}
    return found if isinstance(inputs, Mapping) else tuple(found[value.name] for value in graph.inputs)


class Steps:
    """Runs a graph again and again, and keeps its carried states in between.

    >>> steps = Steps(graph)
    >>> results = [steps(chunk) for chunk in chunks]

    ``run`` is what computes the graph: itself, or a module or session that takes and gives the same flat lists.
    """

    def __init__(self, graph: Graph, run: Callable[..., Any] | None = None) -> None:
        self.graph = graph
        self.run = run
        self.states: list[torch.Tensor] | None = None

    def __call__(self, *inputs: torch.Tensor) -> list[Any]:
        """The ordinary outputs for the next inputs."""
        states = first_states(self.graph, inputs) if self.states is None else self.states
        by_name = {s.before.name: x for s, x in zip(carried(self.graph), states, strict=True)}
        given = iter(inputs)
        flat = [by_name[v.name] if v.name in by_name else next(given) for v in self.graph.inputs]
        results = self.graph.run(flat) if self.run is None else self.run(*flat)
        results = list(results) if isinstance(results, tuple | list) else [results]
        after = {state.after for state in self.graph.states if state.returned}
        pairs = list(zip(self.graph.outputs, results, strict=True))
        self.states = [result for output, result in pairs if output in after]
        return [result for output, result in pairs if output not in after]
