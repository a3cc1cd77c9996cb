"""Slices that share out a whole axis between them are one split.

    a, b = x[..., :h], x[..., h:]       a, b = split(x, (h, h), dim=-1)

Rotary halves, gates, fused projections and heads of detectors are written so by many exporters. Only where all sizes
are known numbers: a runtime would have to compute the others for the split, too.
"""

from __future__ import annotations

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.purity import is_fixed
from regauge.passes.simplify.limits import Limits, held_values, scopes
from regauge.passes.simplify.pieces import axis_of, piece


def split_partitions(graph: Graph, limits: Limits) -> int:
    """Make one split of slices that share out an axis; returns how many nodes went."""
    return sum(_split_scope(owner, build) for owner, build in scopes(graph))


def _split_scope(graph: Graph, build: Builder) -> int:
    held, count = held_values(graph), 0
    slices: dict[tuple[Value, int], dict[int, Node]] = {}
    for node in graph.nodes:
        if node.op != "slice" or node.output in held or is_fixed(node):
            continue
        axis = axis_of(node)
        found = piece(node.output, axis)  # of itself, where it leaves entries out in between
        if found.base is node.inputs[0] and not isinstance(found.base, Parameter) and isinstance(found.start, int):
            slices.setdefault((found.base, axis), {}).setdefault(found.start, node)
    for (base, axis), starts in slices.items():
        parts = _partition(starts, axis, base.shape[axis])
        if len(parts) > 1:
            _split(graph, build, axis, parts)
            count += len(parts) - 1
    return count


def _partition(starts: dict[int, Node], axis: int, size: object) -> list[Node]:
    """The slices that lie end to end from the start of the axis to its end; none where they do not reach."""
    parts: list[Node] = []
    at = 0
    while at != size:
        node = starts.get(at)
        length = None if node is None else node.output.shape[axis]
        if node is None or not isinstance(length, int) or length < 1:
            return []
        parts.append(node)
        at += length
    return parts


def _split(graph: Graph, build: Builder, axis: int, parts: list[Node]) -> None:
    base = parts[0].inputs[0]  # as it is now: it may be a slice that a split has taken the place of
    with build.at(parts[0]):
        results = build.split(base, dim=axis, sizes=tuple(part.output.shape[axis] for part in parts))
    made = results[0].producer
    made.metadata["regauge.replaces"] = ", ".join(part.metadata.get("regauge.replaces") or part.name for part in parts)
    for part, result in zip(parts, results, strict=True):
        replace_uses(graph, part.output, result)
        remove_node(graph, part)
        result.name = part.output.name
