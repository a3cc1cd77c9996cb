"""What planning gives: the steps of a graph, and what was refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regauge.ir.fusion.footprint import Footprint
from regauge.ir.fusion.region import Region, is_view
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.roofline import VIEWS


@dataclass(frozen=True)
class Refusal:
    """Two regions that stayed apart: why, the value between them, and the bytes that one kernel would have saved.

    Of regions beside one another it is a value that both read; ``reader`` is of the second one.
    """

    reason: str
    bytes: int
    value: Value
    reader: Node


@dataclass(frozen=True)
class Plan:
    """The regions of a graph and the nodes that are in none, in an order in which they can run, and what was refused.

    ``bytes`` are those that regions and other nodes read and write, ``bytes_before`` and ``kernels_before`` what it is
    with each node by itself.
    Nodes that torch gives as views move none, and are no kernels. ``footprints`` are what kernels of several nodes take
    of the device, where that is known.
    """

    graph: Graph
    steps: tuple[Region | Node, ...]
    refusals: tuple[Refusal, ...]
    bytes: int
    bytes_before: int
    kernels_before: int
    footprints: Mapping[Region, Footprint] = field(default_factory=dict)

    @property
    def regions(self) -> list[Region]:
        return [step for step in self.steps if isinstance(step, Region)]

    @property
    def kernels(self) -> list[Region | Node]:
        return [step for step in self.steps if isinstance(step, Region) or not moves_nothing(step)]


def moves_nothing(node: Node) -> bool:
    """Whether torch gives the result of a node as a view of its operand."""
    return node.op in VIEWS or is_view(node)
