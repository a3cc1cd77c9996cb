"""What the caches of a decoder take for each position of a sequence."""

from __future__ import annotations

from math import prod

import sympy

from regauge.ir.cost import item_size
from regauge.ir.graph import Graph, State
from regauge.ir.sizes.expressions import Size, evaluate, symbols_in
from regauge.ir.states import carried

_MANY = 2**10 * 3**3 * 5**2 * 7  # positions, of which most blocks are whole shares


def cache_bytes(graph: Graph) -> float:
    """Bytes per position of one sequence: what the states grow by from run to run, where they grow."""
    grown = [(state, axes) for state in carried(graph) if (axes := _growing(state))]
    past = symbols_in([state.before.shape[axis] for state, axes in grown for axis in axes])
    return sum(_added(state, axes, past) for state, axes in grown)


def _growing(state: State) -> list[int]:
    sizes = zip(state.before.shape, state.after.shape, strict=True)
    return [axis for axis, (before, after) in enumerate(sizes) if before != after]


def _added(state: State, axes: list[int], past: set[sympy.Symbol]) -> float:
    """Of a state the bytes for each position that a run adds to an empty one."""
    after = [state.after.shape[axis] for axis in axes]
    counts = {**dict.fromkeys(symbols_in(after), _MANY), **dict.fromkeys(past, 0)}
    share: float = prod(evaluate(size, counts) for size in after) / _MANY
    others = prod(entries(size) for axis, size in enumerate(state.before.shape) if axis not in axes)
    return share * others * item_size(state.before.dtype)


def entries(size: Size) -> int:
    """The entries of an axis for one sequence: every other dynamic size counts sequences."""
    found: int = evaluate(size, dict.fromkeys(symbols_in(size), 1))
    return found


def in_words(count: float) -> str:
    return f"{count:,.0f} bytes" if count == round(count) else f"{count:,.1f} bytes"
