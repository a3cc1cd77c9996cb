"""What the caches of a decoder take for each position of a sequence."""

from __future__ import annotations

from math import prod

from regauge.ir.cost import item_size
from regauge.ir.graph import Graph
from regauge.ir.sizes import symbols_in
from regauge.ir.states import carried


def cache_bytes(graph: Graph) -> float:
    """Bytes per position of one sequence: of the states that grow from run to run, what one entry takes."""
    growing = [
        state.before
        for state in carried(graph)
        if any(before != after for before, after in zip(state.before.shape, state.after.shape, strict=True))
    ]
    return sum(item_size(v.dtype) * prod(size for size in v.shape if not symbols_in(size)) for v in growing)


def in_words(count: float) -> str:
    return f"{count:,.0f} bytes" if count == round(count) else f"{count:,.1f} bytes"
