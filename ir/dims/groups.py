"""Dependency groups: each free or pinned Dim that occurs in a parameter, with every place where it occurs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from regauge.ir.dims.extents import Dim, Pin
from regauge.ir.errors import ExplainError
from regauge.ir.graph import Graph, Parameter
from regauge.ir.sizes.expressions import Size


class Member(NamedTuple):
    """One occurrence of a Dim: in which parameter, and on which axis."""

    parameter: Parameter
    axis: int

    def __str__(self) -> str:
        return f"{self.parameter.name}:{self.axis}"


@dataclass
class Group:
    """Axes that are cut together: one Dim and its members.

    ``majors`` are given where the indices may be chosen in each index of these by itself
    (:mod:`regauge.ir.dims.majors`).
    """

    dim: Dim
    members: list[Member] = field(default_factory=list)
    majors: tuple[Dim, ...] = ()

    @property
    def name(self) -> str:
        return self.dim.name

    @property
    def size(self) -> Size:
        return self.dim.size

    @property
    def choices(self) -> tuple[int, ...]:
        """What is chosen among: [*sizes of the majors, size]."""
        return tuple(int(dim.size) for dim in (*self.majors, self.dim))

    @property
    def pins(self) -> tuple[Pin, ...]:
        return self.dim.pins

    @property
    def free(self) -> bool:
        """Whether indices of the Dim may be removed."""
        return not self.dim.pins and isinstance(self.dim.size, int) and self.dim.size > 1

    def __repr__(self) -> str:
        state = "free" if self.free else f"pinned: {self.pins[0]}" if self.pins else "size 1"
        return f"<Group {self.name} of {self.size}, {len(self.members)} members, {state}>"


def dependency_groups(graph: Graph) -> list[Group]:
    """All groups of a graph, in the order in which their Dims first occur in its parameters."""
    return list(graph.axes.groups.values())


def free_groups(graph: Graph) -> list[Group]:
    return [group for group in graph.groups() if group.free]


def find_group(graph: Graph, name: str) -> Group:
    """The group of a Dim given by its name, or by a parameter axis such as ``conv1.weight:0``; raises ExplainError."""
    found = find_groups(graph, name)
    if len(found) == 1:
        return found[0]
    choices = ", ".join(group.name for group in found)
    raise ExplainError(f"the axis {name} has several Dims: name one of {choices}")


def find_groups(graph: Graph, name: str) -> list[Group]:
    """The group of the Dim of this name, or those of all Dims of this parameter axis; raises ExplainError."""
    groups: Iterable[Group] = graph.groups()
    for group in groups:
        if group.name == name:
            return [group]
    at = [group for group in groups if any(f"{n}:{m.axis}" == name for m in group.members for n in m.parameter.names)]
    if at:
        return at
    from difflib import get_close_matches

    close = get_close_matches(name, [group.name for group in groups], 3)
    hint = f"; did you mean {' or '.join(close)}?" if close else "; `regauge groups` lists them"
    raise ExplainError(f"no Dim or parameter axis is called {name!r}{hint}")
