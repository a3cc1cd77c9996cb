"""What the caches of a decoder take for each position of a sequence."""

from __future__ import annotations

from math import prod

from regauge.ir.cost import item_size
from regauge.ir.graph import Graph
from regauge.ir.sizes import Size, evaluate, symbols_in
from regauge.ir.states import carried


def cache_bytes(graph: Graph) -> float:
    """Bytes per position of one sequence: of the states that grow from run to run, what one entry takes."""
    total = 0.0
    for state in carried(graph):
        sizes = list(zip(state.before.shape, state.after.shape, strict=True))
        if any(before != after for before, after in sizes):
            counts = (entries(before) for before, after in sizes if before == after)
            total += prod(counts) * item_size(state.before.dtype)
    return total


def entries(size: Size) -> int:
    """The entries of an axis for one sequence: every other dynamic size counts sequences."""
    found: int = evaluate(size, dict.fromkeys(symbols_in(size), 1))
    return found


def in_words(count: float) -> str:
    return f"{count:,.0f} bytes" if count == round(count) else f"{count:,.1f} bytes"
