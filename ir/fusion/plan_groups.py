"""Groups of nodes in planning: what is one kernel so far, and what may stand beside or before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from regauge.ir.fusion.footprint import Footprint
from regauge.ir.fusion.region import Region, below_results, is_view
from regauge.ir.graph import Node, Value


class Group:
    """Nodes that are one kernel so far; ``region`` is None where they are no region, ``why`` says the reason.

    ``beside`` are results of parts that nothing else connects: they have the same loops. ``footprint`` is what the
    kernel takes of the device, where that is known.
    """

    __slots__ = ("nodes", "beside", "first", "last", "region", "footprint", "why", "bytes", "seconds")

    def __init__(self, nodes: list[Node], first: int, last: int, beside: tuple[Value, ...] = ()) -> None:
        self.nodes, self.beside = nodes, beside
        self.first, self.last = first, last  # positions in the graph
        self.region: Region | None = None
        self.footprint: Footprint | None = None
        self.why = ""
        self.bytes = 0.0
        self.seconds = 0.0


def whole(group: Group) -> Value | None:
    """A result with all loops of a region that may have others beside it, or all but those of its contractions."""
    region = group.region
    if region is None or not region.nodes or region.kind == "attention":
        return None
    loops = set(region.loops).difference(*(term.over for term in region.contractions))
    return next((value for value in region.outputs if loops <= region.dims(value)), None)


def kept_apart(region: Region, largest: Value) -> tuple[object, ...]:
    """What regions beside one another have in common: their kind, and a shape, or of contractions the left factor."""
    factors = [below_results(below_results(term.args[0]).args[0]) for term in region.contractions[:1]]
    found = [factor.value.value if factor.op == "load" else region for factor in factors] or [largest.shape]
    return region.kind, *found


def steps_of(group: Group) -> list[Region | Node]:
    """The region of a group, and behind it the views of its results."""
    if group.region is None or not group.region.nodes:
        return list(group.nodes)
    inside = set(group.region.nodes)
    return [group.region, *(node for node in group.nodes if node not in inside)]


def trimmed(nodes: Sequence[Node]) -> list[Node]:
    """Without views at the ends: torch hands on in another layout for nothing."""
    kept = list(nodes)
    while True:
        inside = set(kept)
        rest = [
            node
            for node in kept
            if not is_view(node)
            or any(value.producer in inside for _, value in node.operands())
            and any(user in inside for user, _ in node.output.uses)
        ]
        if len(rest) == len(kept):
            return kept
        kept = rest


def before_views(nodes: Sequence[Node]) -> Iterator[tuple[Node, list[Node]]]:
    """What computes what nodes read through views, or directly, and these views."""
    inside = set(nodes)
    found: dict[Node, list[Node]] = {}
    paths: list[tuple[Value, tuple[Node, ...]]] = [(value, ()) for node in nodes for _, value in node.operands()]
    for value, views in paths:
        producer = value.producer
        if producer is None or producer in inside:
            continue
        if is_view(producer):
            paths += [(above, (*views, producer)) for _, above in producer.operands()]
        else:
            found.setdefault(producer, []).extend(views)
    yield from found.items()
