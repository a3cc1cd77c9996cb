"""How many bytes a kernel of a region reads and writes."""

from __future__ import annotations

from collections.abc import Callable

from regauge.ir.cost import item_size
from regauge.ir.fusion.online import online_sums, passes
from regauge.ir.fusion.region import Region, Term, terms_below
from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import Size, product

PERSISTENT = 16384
"""Indices of a row that one program holds; longer rows are read again for each reduction that waits for another one,
and for what comes behind."""


def bytes_moved(region: Region, value_bytes: Callable[[Value], float], bound: Callable[[Size], Size]) -> float:
    """Bytes that a kernel of the region reads and writes, of tensors that it reads in part only these parts."""
    columns = product(bound(dim.size) for dim in region.reduced)
    long = int(columns) > PERSISTENT and not region.contractions
    again = 1 + max(passes(region, online_sums(region)).values()) if long else 1
    parts: dict[Value, float] = {}
    times: dict[Value, float] = {}
    repeats = _repeats(region, bound)
    for load in region.loads:
        value = load.value.value
        part = product(bound(dim.size) for dim in load.axes) * item_size(value.dtype)
        parts[value] = min(value_bytes(value), parts.get(value, 0) + part)
        read = repeats.get(load, 1) * (again if load.axes & region.reduced else 1)
        times[value] = max(times.get(value, 1), read)
    written = sum(map(value_bytes, region.outputs))
    return written + sum(times[value] * part for value, part in parts.items())


def _repeats(region: Region, bound: Callable[[Size], Size]) -> dict[Term, float]:
    """How often what is reduced is read, as rows are that differ in loops which the reduction has not."""
    found: dict[Term, float] = {}
    for term in [] if region.contractions else region.reductions:
        others = [dim for dim in region.loops if dim not in region.reduced and dim not in term.axes]
        if others:
            repeated = product(bound(dim.size) for dim in others)
            found.update((below, float(repeated)) for below in terms_below(term))
    return found
