"""Slices that share out a whole axis between them are one split.

    a, b = x[..., :h], x[..., h:]       a, b = split(x, (h, h), dim=-1)
    a, b = split(x, (2, 4))             a, c, d = split(x, (2, 2, 2))      where c, d = split(b, (2, 2))

Rotary halves, gates, fused projections and heads of detectors are written so by many exporters. Only where all sizes
are known numbers: a runtime would have to compute the others for the split, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regauge.ir.edit import Builder, remove_node, replace_uses
from regauge.ir.folding.purity import is_fixed
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.simplify.limits import Limits, held_values, scopes
from regauge.passes.simplify.pieces import axis_of, piece


def split_partitions(graph: Graph, limits: Limits) -> int:
    """Make one split of slices that share out an axis, and of a split of a part; returns how many nodes went."""
    count, owners = 0, list(scopes(graph))
    for owner, build in owners:
        elsewhere = set().union(*(held_values(other) for other, _ in owners if other is not owner))
        count += _split_scope(owner, build) + _split_parts(owner, build, elsewhere)
    return count


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


def _split_parts(graph: Graph, build: Builder, elsewhere: set[Value]) -> int:
    """Make one split of a split and of that of one of its parts along the same axis, where nothing else reads that."""
    count = 0
    for node in list(graph.nodes):
        part = node.inputs[0] if node.op == "split" else None
        outer = part.producer if isinstance(part, Value) else None
        if not isinstance(part, Value) or outer is None or outer.op != "split" or axis_of(outer) != axis_of(node):
            continue
        if (
            len(part.uses) > 1
            or part in held_values(graph)
            or not elsewhere.isdisjoint((*outer.outputs, *node.outputs))
        ):
            continue
        if not is_fixed(node) and not is_fixed(outer):
            _splice(graph, build, outer, node, part.index)
            count += 1
    return count


def _splice(graph: Graph, build: Builder, outer: Node, inner: Node, place: int) -> None:
    def spliced(of_outer: Sequence[Any], of_inner: Sequence[Any]) -> list[Any]:
        return [*of_outer[:place], *of_inner, *of_outer[place + 1 :]]

    sizes = spliced(outer.attributes["sizes"], inner.attributes["sizes"])
    with build.at(outer):
        results = build.split(outer.inputs[0], dim=outer.attributes["dim"], sizes=tuple(sizes))
    made = results[0].producer
    made.metadata["regauge.replaces"] = ", ".join(n.metadata.get("regauge.replaces") or n.name for n in (outer, inner))
    old = spliced(outer.outputs, inner.outputs)
    for value, result in zip(old, results, strict=True):
        replace_uses(graph, value, result)
    remove_node(graph, inner)
    remove_node(graph, outer)
    for value, result in zip(old, results, strict=True):
        result.name = value.name
