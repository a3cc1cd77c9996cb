"""Inputs made up where there is no data: noise by the type and the shape of each input.

Floating-point inputs get normal numbers, integers valid indices of the table that they are looked up in, masks ones.
What a convolution reads gets images (:mod:`regauge.passes.calibration.image_noise`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import sympy
import torch

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Value
from regauge.ir.running.sample_inputs import followed_uses, lookup_bound, sample_inputs, sample_runs
from regauge.ir.sizes.expressions import evaluate
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.image_noise import image_noise

_PLACES = 384 << 10  # places of all inputs together that are enough for the moments of most layers
_FEWEST, _MOST = 32, 384  # examples
_BATCH_PLACES = 1 << 17


def noise_batches(graph: Graph, examples: int | None = None, seed: int = 0, *, parts: int = 1) -> list[tuple[Any, ...]]:
    """Made-up batches that the graph runs on, about ``examples`` in all; the same for the same seed.

    By default 32 to 384 examples, fewer of large images. Only one of so many ``parts`` of them is made, for callers
    that make others of it. Raises PassError where no made-up inputs run.
    """
    sizes = _sizes(graph)
    symbol = _batch_symbol(graph)
    wanted = examples or min(max(_PLACES // _places(graph, sizes), _FEWEST), _MOST)
    wanted = -(-wanted // parts)
    whole = min(wanted, max(2, _BATCH_PLACES // _places(graph, sizes)), 64)
    batches: list[tuple[Any, ...]] = []
    found = 0
    while found < wanted:
        size = min(whole, wanted - found)
        if symbol is not None:
            low, high = graph.symbols.get(symbol, (1, None))
            sizes[symbol] = max(low, size if high is None else min(size, high))
        batch = _noise(graph, sizes, seed * 100_003 + len(batches))
        found += max(1, examples_in(batch)) if batch else wanted
        batches.append(batch)
    return batches


def _sizes(graph: Graph) -> dict[sympy.Symbol, int]:
    """Dynamic sizes with which the graph runs."""
    for inputs, _ in sample_runs(graph):
        sizes: dict[sympy.Symbol, int] = {}
        for value, x in zip(graph.inputs, inputs, strict=True):
            sizes |= {s: int(n) for s, n in zip(value.shape, x.shape, strict=True) if isinstance(s, sympy.Symbol)}
        return sizes
    raise PassError(f"no inputs can be made up that graph {graph.name!r} runs on: give data")


def _batch_symbol(graph: Graph) -> sympy.Symbol | None:
    """The dynamic size that counts examples: the first axis of the first input, where it is nowhere another axis."""
    first = graph.inputs[0].shape[:1] if graph.inputs else ()
    if not first or not isinstance(first[0], sympy.Symbol):
        return None
    elsewhere = any(first[0] in value.shape[1:] for value in graph.inputs)
    return None if elsewhere else first[0]


def _places(graph: Graph, sizes: dict[sympy.Symbol, int]) -> int:
    """Places of an image, or steps of a sequence, of one example."""
    counts = [1]
    for value in graph.inputs:
        shape = [int(n) for n in evaluate(value.shape, sizes)]
        counts.append(math.prod(shape[2:]) if len(shape) > 3 else max(shape[1:], default=1))
    return max(counts)


def _noise(graph: Graph, sizes: dict[sympy.Symbol, int], seed: int) -> tuple[Any, ...]:
    defaults = graph.metadata.get("input_defaults", {})
    found: list[Any] = []
    for value, x in zip(graph.inputs, sample_inputs(graph, seed=seed, sizes=sizes), strict=True):
        if value.name in defaults:
            found.append(defaults[value.name].load())
        elif x.is_floating_point() and x.dim() > 2 and _is_image(value):
            found.append(image_noise(tuple(x.shape), seed).to(x.dtype))
        elif not x.is_floating_point() and not x.is_complex() and lookup_bound(value) is None:
            found.append(torch.ones_like(x))
        else:
            found.append(x)
    return tuple(found)


def _is_image(value: Value) -> bool:
    return any(node.op == "conv" and slot == 0 for node, slot in followed_uses(value))


def float_inputs(graph: Graph) -> Iterator[tuple[int, Value]]:
    """The inputs that are real numbers, with their places."""
    for place, value in enumerate(graph.inputs):
        if isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point:
            yield place, value
