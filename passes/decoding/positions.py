"""Which values of a decoder have an axis of positions, and which depend on nothing but how many positions there are.

streamed      computed from the inputs: a row for each position (tokens, keys, hidden values)
positional    computed from the number of positions alone: masks, angles, rows of a table of places
neither       weights, and what is computed from them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy

from regauge.ir.dims.extents import leaves
from regauge.ir.dims.local_axes import local_axes
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.sizes.expressions import symbols_in

ATTENTIONS = ("attention", "capped_attention")


@dataclass(frozen=True)
class Positions:
    """The dynamic size that counts positions, and the values of a graph that depend on it.

    ``nodes`` are those of the graph as it was, in the order in which they run.
    """

    length: sympy.Symbol
    nodes: Sequence[Node] = ()
    streamed: set[Value] = field(default_factory=set)
    positional: set[Value] = field(default_factory=set)

    def axes(self, value: Value) -> list[int]:
        """The axes of a value that have an entry for each position."""
        return [axis for axis, size in enumerate(value.shape) if size == self.length]

    def plain(self, value: Value) -> bool:
        """Whether positions are only met as whole axes: they are not merged with others, nor counted with an offset."""
        return all(size == self.length or self.length not in symbols_in(size) for size in value.shape)


def find_positions(graph: Graph, name: str | None = None) -> Positions:
    """What counts positions: the dynamic size called ``name``, or that of attention's queries.

    Raises PassError where there is none, or several.
    """
    found = Positions(_length(graph, name), tuple(graph.nodes))
    found.streamed.update(value for value in graph.inputs if found.axes(value))
    for node in graph.nodes:
        given = [value for _, value in node.operands()]
        if any(value in found.streamed for value in given):
            found.streamed.update(node.outputs)
        elif any(value in found.positional for value in given) or _reads(node, found.length):
            found.positional.update(node.outputs)
    return found


def _length(graph: Graph, name: str | None) -> sympy.Symbol:
    sizes = symbols_in([value.shape for value in graph.inputs])
    if name is not None:
        named = [size for size in sizes if str(size) == name]
        if not named:
            known = ", ".join(sorted(map(str, sizes))) or "none"
            raise PassError(f"no dynamic size of an input is called {name!r}: there are {known}")
        return named[0]
    candidates = {size for node in graph.nodes for size in _counted(node) if size in sizes}
    if len(candidates) == 1:
        return candidates.pop()
    if candidates:
        raise PassError(f"positions may be counted by {' or '.join(sorted(map(str, candidates)))}: say which by axis=")
    raise PassError(
        "no attention runs over an axis of dynamic size: capture the model with its axis of positions dynamic, such as "
        "dynamic={0: {0: 'batch', 1: 'length'}}"
    )


def _counted(node: Node) -> Sequence[sympy.Symbol]:
    """What may count positions: the rows of attention's queries, or a size that a result has twice (scores)."""
    if node.op in ATTENTIONS:
        query = node.inputs[0]
        sizes = query.shape[-2:-1] if isinstance(query, Value) else ()
    else:
        sizes = tuple(s for value in node.outputs for s in set(value.shape) if value.shape.count(s) > 1)
    return [size for size in sizes if isinstance(size, sympy.Symbol)]


def _reads(node: Node, length: sympy.Symbol) -> bool:
    numbers = [operand for operand in node.inputs if not isinstance(operand, Value)]
    return length in symbols_in([numbers, list(node.attributes.values())])


MIXING = frozenset({"normalise", "scan", "whole", "window", "indexed", "reduce"})
"""Roles of axes along which entries of a result are made of other entries."""

Place = tuple[int, int]
"""An axis of an operand: its slot, and which axis."""


@dataclass
class Courses:
    """Where the axes of positions of a node's operands go.

    ``kept`` gives those that a result has, entry for entry, with the axis of the result; ``ended`` are those that no
    result has any more (contracted, reduced, looked up), ``merged`` those that are parts of larger ones, ``mixing``
    the axes of the result along which its entries are made of other entries.
    """

    kept: dict[Place, int] = field(default_factory=dict)
    ended: list[Place] = field(default_factory=list)
    merged: list[Place] = field(default_factory=list)
    mixing: set[int] = field(default_factory=set)


def courses(node: Node, positions: Positions) -> Courses | None:
    """By the rule of the node's operator; None where that does not fit."""
    local = local_axes(node)
    if local is None:
        return None
    found, result_leaves = Courses(), [[leaves(extent) for extent in axes] for axes in local.results]
    for slot, value in node.operands():
        for axis in positions.axes(value):
            dims = leaves(local.operands[slot][axis])
            homes = [j for axes in result_leaves for j, own in enumerate(axes) if own == dims]
            if homes:
                found.kept[slot, axis] = homes[0]
            elif any(dim in own for axes in result_leaves for own in axes for dim in dims):
                found.merged.append((slot, axis))
            else:
                found.ended.append((slot, axis))
    for axes in result_leaves:
        found.mixing |= {j for j, own in enumerate(axes) if any(local.roles.get(dim) in MIXING for dim in own)}
    return found
