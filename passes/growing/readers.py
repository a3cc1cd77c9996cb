"""Where the indices of a Dim are added up, so that copies of one share what it counted there.

    y = w2 relu(w1 x)       the columns of w2 read h: of two copies of a unit each counts a part
    y = w2 norm(h)          a norm reads the mean of h: it stays if every index has as many copies as the others

Each node is asked by its own axis rule, so that no architecture has to be known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from regauge.ir.axis_rules.rules import ENDING_ROLES
from regauge.ir.dims.extents import Dim, Extent, leaves
from regauge.ir.dims.local_axes import LocalAxes, local_axes
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.operator import Symmetry, symmetry_of

Reader: TypeAlias = tuple[Parameter, int]  # and the axis on which it has the Dim

_MEANS = {"layer_norm", "rms_norm", "group_norm", "instance_norm", "mean"}
_EXTREMES = {"max", "min"}  # of copies the same


@dataclass
class Readers:
    """Of one Dim: the parameters that add its indices up; ``even`` where something takes their mean besides."""

    sides: set[Reader] = field(default_factory=set)
    even: bool = False


class _Refused(Exception):
    """Why the indices of a Dim cannot have copies."""


def readers_of(graph: Graph, dims: Collection[Dim]) -> dict[Dim, Readers | str]:
    """What reads each Dim, or the reason why its indices cannot have copies. Dims are those that may be reordered."""
    analysis, wanted = graph.axes, set(dims)
    found: dict[Dim, Readers | str] = {dim: Readers() for dim in dims}
    at: dict[tuple[Dim, Reader], set[Node]] = {}
    for node in analysis.calls:
        places = _places(node, analysis.of, wanted)
        local = local_axes(node) if places else None
        for dim, own in places.items():
            so_far = found[dim]
            if isinstance(so_far, str):
                continue
            try:
                if local is None:
                    raise _Refused(f"the rule of {node.op} does not say how it reads it")
                for side in _read_by(node, local, analysis.of, dim, own, so_far):
                    so_far.sides.add(side)
                    at.setdefault((dim, side), set()).add(node)
            except _Refused as reason:
                found[dim] = str(reason)
    for (dim, (parameter, _)), nodes in at.items():
        if {node for node, _ in parameter.uses} != nodes:
            found[dim] = "a weight that reads it is tied to another use"
    return found


def _places(node: Node, of: Mapping[Value, list[Extent]], wanted: set[Dim]) -> dict[Dim, list[tuple[int, int]]]:
    """For each Dim the operand slots and axes that have it."""
    found: dict[Dim, list[tuple[int, int]]] = {}
    for slot, value in node.operands():
        for axis, extent in enumerate(of[value]):
            for dim in wanted.intersection(leaves(extent)):
                found.setdefault(dim, []).append((slot, axis))
    return found


def _read_by(
    node: Node,
    local: LocalAxes,
    of: Mapping[Value, list[Extent]],
    dim: Dim,
    places: list[tuple[int, int]],
    own: Readers,
) -> Iterator[Reader]:
    """The parameter of a node that adds the indices up, if it does; raises _Refused where no parameter does."""
    ended = []
    for slot, axis in places:
        operand = node.inputs[slot]
        assert isinstance(operand, Value)
        roles = _roles(of[operand][axis], local.operands[slot][axis], dim, local)
        if roles & {"normalise", "reduce"}:
            if node.op not in _MEANS | _EXTREMES:
                raise _Refused(f"{node.op} adds its indices up")
            own.even = own.even or node.op in _MEANS
        elif "contract" in roles:
            if roles != {"contract"}:
                raise _Refused(f"{node.op} reads a part of its indices otherwise")
            ended.append((operand, axis))
    if not ended:
        return
    weights = [(value, axis) for value, axis in ended if isinstance(value, Parameter)]
    if not weights:
        raise _Refused(f"{node.op} multiplies computed values along it")
    if symmetry_of(node) is not Symmetry.PRODUCT:
        raise _Refused(f"{node.op} adds its indices up")
    yield weights[-1]


def _roles(extent: Extent, own: Extent, dim: Dim, local: LocalAxes) -> set[str]:
    """What a node does to the indices of a Dim on one axis, whose extent by the node alone is ``own``."""
    every, alone = leaves(extent), leaves(own)
    if [d.size for d in every] == [d.size for d in alone]:
        alone = [leaf for leaf, other in zip(alone, every, strict=True) if other is dim]
    stated = dict.fromkeys(alone, "map")
    for role, whole in local.call.roles:
        if role in ENDING_ROLES:
            stated.update({leaf: role for leaf in leaves(whole) if leaf in stated})
    return set(stated.values())
