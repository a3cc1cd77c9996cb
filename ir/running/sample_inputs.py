"""Inputs made up from the signature of a graph: to check a rewrite or compare two graphs where no data is given."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import sympy
import torch

from regauge.ir.errors import GraphError, RegaugeError
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.sizes.expressions import evaluate
from regauge.ir.storage.weights import writes

MOST_REMEMBERED = 1 << 26  # bytes
_FOLLOWED = {"cast", "identity", "reshape", "unsqueeze", "squeeze", "expand", "slice", "select", "permute", "clamp"}


def sample_inputs(graph: Graph, *, seed: int = 0, sizes: dict[sympy.Symbol, int] | None = None) -> list[torch.Tensor]:
    """One tensor per graph input: normal numbers, integers that are valid indices where they are looked up, true masks.

    Dynamic sizes get small values inside their ranges, unless ``sizes`` gives them. Raises GraphError for an input of
    a type that torch does not have.
    """
    bindings = {**_small_sizes(graph), **(sizes or {})}
    generator = torch.Generator().manual_seed(seed)
    return [_sample(value, bindings, generator) for value in graph.inputs]


def sample_runs(graph: Graph) -> Iterator[tuple[list[Any], list[Any]]]:
    """Made-up inputs that the graph can be run on, each with its results.

    Of a graph with dynamic sizes several bindings are tried, small ones, all ones, and those of images and signals; it
    may have preconditions that only some meet (a window must fit). Inputs that have defaults are given these.
    """
    from regauge.ir.running.interpret import run_seeded

    for inputs in candidates(graph):
        try:
            results = run_seeded(graph, inputs)
        except (RegaugeError, RuntimeError):
            continue
        yield inputs, results


def fitting_inputs(graph: Graph, *, seed: int = 0, least: int = 1) -> list[Any]:
    """Made-up inputs of dynamic sizes, none below ``least``, that the graph can be run on, as a window has to fit.

    Where no such sizes are found, or there are none that vary, they are :func:`sample_inputs`.
    """
    symbols = input_symbols(graph)
    for inputs, _ in chain(remembered_runs(graph), sample_runs(graph)) if symbols else ():
        pairs = [
            pair
            for value, x in zip(graph.inputs, inputs, strict=True)
            for pair in zip(value.shape, x.shape, strict=True)
        ]
        sizes = {size: number for size, number in pairs if isinstance(size, sympy.Symbol)}
        if min(sizes.values(), default=least) >= least:
            return inputs if seed == 0 else sample_inputs(graph, seed=seed, sizes=sizes)
    return sample_inputs(graph, seed=seed)


def remember_runs(graph: Graph, runs: list[tuple[list[Any], list[Any]]]) -> None:
    """Note what the graph, as it is now, gives on made-up inputs, for whoever checks what is made of it next.

    Runs whose tensors take much memory are not kept.
    """
    tensors = [t for inputs, results in runs for t in (*inputs, *results) if isinstance(t, torch.Tensor)]
    if sum(tensor.nbytes for tensor in tensors) <= MOST_REMEMBERED:
        graph._runs = (_state(graph), runs)


def remembered_runs(graph: Graph) -> list[tuple[list[Any], list[Any]]]:
    """Runs that were noted, if the graph and the data of its weights are still the same."""
    return graph._runs[1] if graph._runs is not None and graph._runs[0] == _state(graph) else []


def _state(graph: Graph) -> tuple[int, int]:
    return graph.version, sum(writes(parameter.weight) for parameter in graph.all_parameters())


# Sizes tried for dynamic axes of images and signals where small ones do not fit (a network of strides and windows).
_LARGER = (16, 64, 256, 512, 224)
_FEW = 2  # for the axes that only count examples or steps


def candidates(graph: Graph) -> Iterator[list[Any]]:
    """Made-up inputs that the graph may run on, the likeliest first; nothing is run to tell."""
    symbols = input_symbols(graph)
    try:
        yield _with_defaults(graph, sample_inputs(graph))
        for size in (1, _FEW, *_LARGER) if symbols else ():
            sizes = {s: _within(graph, s, size if _measures(graph, s) else min(size, _FEW)) for s in symbols}
            yield _with_defaults(graph, sample_inputs(graph, seed=size, sizes=sizes))
    except RegaugeError:
        return


def _with_defaults(graph: Graph, inputs: list[Any]) -> list[Any]:
    """Initializers that callers may override are tried as they are."""
    defaults = graph.metadata.get("input_defaults", {})
    pairs = zip(graph.inputs, inputs, strict=True)
    return [defaults[value.name].load() if value.name in defaults else x for value, x in pairs]


def input_symbols(graph: Graph) -> set[sympy.Symbol]:
    """The dynamic sizes in the shapes of the graph's inputs."""
    sizes = [size for value in graph.inputs for size in value.shape if isinstance(size, sympy.Basic)]
    return set().union(*(size.free_symbols for size in sizes))


def _measures(graph: Graph, symbol: sympy.Symbol) -> bool:
    """Whether a dynamic size is only met where images and signals have their extent: behind axis 1, or last."""
    shapes = [value.shape for value in graph.inputs]
    places = [(axis, len(shape)) for shape in shapes for axis, size in enumerate(shape) if size == symbol]
    return all(axis >= 2 or axis == rank - 1 for axis, rank in places)


def _within(graph: Graph, symbol: sympy.Symbol, size: int) -> int:
    low, high = graph.symbols.get(symbol, (1, None))
    return max(low, size if high is None else min(size, high))


def _small_sizes(graph: Graph) -> dict[sympy.Symbol, int]:
    symbols = set(graph.symbols)
    for value in graph.inputs:
        for size in value.shape:
            symbols |= getattr(size, "free_symbols", set())
    found, number = {}, 1
    for symbol in sorted(symbols, key=str):
        number += 1
        low, high = graph.symbols.get(symbol, (1, None))
        found[symbol] = min(max(number, low), number if high is None else high)
        found[symbol] = max(found[symbol], low)
    return found


def _sample(value: Value, bindings: dict[sympy.Symbol, int], generator: torch.Generator) -> torch.Tensor:
    dtype = value.dtype
    if not isinstance(dtype, torch.dtype):
        raise GraphError(f"no sample can be made of the input {value}: give inputs of type {dtype}")
    shape: Any = evaluate(value.shape, bindings)
    if dtype is torch.bool:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype.is_complex:
        return torch.complex(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)).to(dtype)
    return torch.randint(0, _index_bound(value), shape, generator=generator).to(dtype)


def _index_bound(value: Value) -> int:
    """The entries of the smallest table in which the value is looked up; 2, as for a mask, where none is found."""
    return lookup_bound(value) or 2


def lookup_bound(value: Value) -> int | None:
    """The entries, at least 2, of the smallest table in which the value is looked up; None where it is in none."""
    tables = [node.inputs[0] for node, slot in followed_uses(value) if node.op == "embedding" and slot > 0]
    sizes = [table.shape[0] for table in tables if isinstance(table, Value)]
    bounds = [size for size in sizes if isinstance(size, int)]
    return max(2, min(bounds)) if bounds else None


def followed_uses(value: Value) -> Iterator[tuple[Node, int]]:
    """Where a value is read, also behind operators that only cast it, lay it out anew or bound it."""
    pending, seen = [value], {value}
    while pending:
        for node, slot in pending.pop().uses:
            yield node, slot
            if node.op in _FOLLOWED:
                new = [output for output in node.outputs if output not in seen]
                seen.update(new)
                pending.extend(new)
