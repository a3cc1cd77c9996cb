"""Whether a graph with caches gives at every step what the whole sequence gives at once: tried on made-up inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from regauge.ir.errors import PassError, RegaugeError
from regauge.ir.graph import Graph, Value
from regauge.ir.running.interpret import run_seeded
from regauge.ir.running.sample_inputs import input_symbols, sample_inputs
from regauge.ir.states import Steps, ordinary_inputs

STEPS = (3, 1, 2)  # positions of each run
TOLERANCE = 1e-4  # of the greatest entry, in float32
TRIES = 3  # inputs: on some a number lies so near the middle of two codes that runs of other sizes round it otherwise


def check_steps(whole: Graph, stepwise: Graph, length: sympy.Symbol) -> None:
    """Raise PassError where a step of ``stepwise`` gives another result than ``whole`` for all positions so far.

    What has no axis of positions is compared at the last step; one input of several that is the same is enough.
    Nothing is said where no inputs can be made up that ``whole`` runs on.
    """
    low, high = whole.symbols.get(length, (1, None))
    counts = [count for count in _cumulative(STEPS) if low <= count and (high is None or count <= high)]
    if not counts:
        return
    sizes = {length: counts[-1], **{s: 2 for s in input_symbols(whole) if s != length}}
    for seed in range(TRIES):
        inputs = sample_inputs(whole, seed=seed, sizes=sizes)
        try:
            results = run_seeded(whole, inputs)
        except RegaugeError:
            return
        off = _first_difference(whole, stepwise, length, counts, inputs, results)
        if off is None:
            return
        if seed + 1 == TRIES:
            start, output = off
            raise PassError(
                f"position {start} of {output} is not the same step by step: the graph is not causal, or "
                "counts positions in a way that is not understood"
            )


def _first_difference(
    whole: Graph, stepwise: Graph, length: sympy.Symbol, counts: list[int], inputs: list[Any], results: list[Any]
) -> tuple[int, Value] | None:
    """The first position of a step, and the output, that is not as in the ``results`` of the whole graph."""
    steps, start = Steps(stepwise), 0
    for count in counts:
        found = steps(*cut_positions(ordinary_inputs(stepwise), inputs, length, start, count))
        wanted = cut_positions(whole.outputs, results, length, start, count)
        for output, a, b in zip(whole.outputs, wanted, found, strict=True):
            counted = isinstance(output, Value) and length in output.shape
            if (counted or count == counts[-1]) and isinstance(output, Value) and not _alike(a, b):
                return start, output
        start = count
    return None


def cut_positions(
    values: Sequence[Any], tensors: Sequence[Any], length: sympy.Symbol, start: int, end: int
) -> list[Any]:
    """Of tensors that stand for values the positions from ``start`` to ``end``, on each axis that counts them."""
    found = []
    for value, tensor in zip(values, tensors, strict=True):
        for axis, size in enumerate(value.shape) if isinstance(value, Value) else ():
            if size == length:
                tensor = tensor.narrow(axis, start, end - start)
        found.append(tensor)
    return found


def _cumulative(counts: Sequence[int]) -> list[int]:
    return [sum(counts[: place + 1]) for place in range(len(counts))]


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    tolerance = TOLERANCE * float(a.abs().max()) if a.numel() else 0.0
    return bool(((a - b).abs() <= tolerance).all()) or bool(torch.equal(a, b))
