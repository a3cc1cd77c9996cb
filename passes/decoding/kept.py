"""Which values of a decoder a cache would keep, and for which attention: what passes on caches make smaller."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from regauge.ir.graph import Graph, Value
from regauge.passes.decoding.cache_bytes import cache_bytes
from regauge.passes.decoding.cuts import Cuts, bytes_each
from regauge.passes.decoding.incremental import Incremental
from regauge.passes.decoding.positions import ATTENTIONS, Positions, find_positions


@dataclass(frozen=True)
class Kept:
    """A value that a cache keeps, by name.

    ``kind`` is "keys" or "values" where an attention, the one with this ``number`` in the graph, reads what is computed
    of it, else ""; ``size`` is the channels of what is read, those of a head as a rule.
    """

    name: str
    kind: str = ""
    number: int = -1
    size: int = 0


def kept_by_cache(graph: Graph, axis: str | None, *, by: str) -> tuple[list[str], float]:
    """The names of the values that ``kv-cache`` would keep, and the bytes that it would take for each position."""
    trial = graph.copy()
    rewrite = Incremental(trial, find_positions(trial, axis), by=by)
    rewrite.run()
    return [value.name for value in rewrite.kept], cache_bytes(trial)


def kept_values(graph: Graph, names: list[str], axis: str | None, *, early: Collection[str] = ()) -> list[Kept]:
    """What is known of the values ``names`` that a cache would keep, in the order in which they are read.

    Of the kinds in ``early`` that is given which they are computed from position by position (keys before they are
    rotated, all heads side by side), where it takes no more room.
    """
    positions = find_positions(graph, axis)
    near, far, found = Cuts(positions), Cuts(positions, far=True), dict[str, Kept]()
    for number, node in enumerate(node for node in graph.nodes if node.op in ATTENTIONS):
        for slot, kind in ((1, "keys"), (2, "values")):
            read = node.inputs[slot]
            if not isinstance(read, Value) or read not in positions.streamed:
                continue
            size = read.shape[-1] if isinstance(read.shape[-1], int) else 0
            for value in near.of(read):
                own = source_of(far, read, value, positions) if kind in early else value
                found.setdefault(value.name, Kept(own.name, kind, number, size))
    return [found.get(name, Kept(name)) for name in names]


def source_of(far: Cuts, read: Value, value: Value, positions: Positions) -> Value:
    """The one value farthest from ``read`` that it is computed from, position by position, at the price of ``value``"""
    found = [own for own in far.of(read) if own.producer is not None]
    same = len(found) == 1 and bytes_each(found[0], positions) == bytes_each(value, positions)
    return found[0] if same else value
