"""Places the values of a run in one block of memory, and tells which are alive at the peak.

Offsets are found greedily by size (Pisarchyk and Lee 2020, Efficient Memory Management for Deep Neural Net Inference,
section 5.2, "Greedy by Size for Offset Calculation"): the largest values first, each into the smallest gap that fits
between those that are alive with it, or behind them. The block is never smaller than the peak, and mostly equal to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regauge.ir.cost import item_size, smallest_sizes
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.memory.activations import Timeline
from regauge.ir.memory.views import storages
from regauge.ir.printing.tables import short
from regauge.ir.sizes.expressions import product

ALIGNMENT = 64
"""Bytes at a multiple of which each value begins: a line of the cache, as allocators of torch do."""


@dataclass(frozen=True)
class Block:
    """The memory of a value and its views: alive from step ``first`` to step ``last``, at ``offset`` in the arena."""

    value: Value
    bytes: int
    first: int
    last: int
    offset: int

    def overlaps(self, other: Block) -> bool:
        """Whether both are alive at a time."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class MemoryPlan:
    """Blocks for all values of a run, the steps of the run (None: inputs are given), and the bytes alive at each."""

    blocks: tuple[Block, ...]
    nodes: tuple[Node | None, ...]
    alive: tuple[int, ...]

    @property
    def peak(self) -> int:
        """Bytes that are alive at the worst step, as :func:`regauge.ir.memory.activations.activation_bytes` counts
        them.
        """
        return max(self.alive)

    @property
    def worst(self) -> int:
        """The first step at which most is alive."""
        return self.alive.index(self.peak)

    @property
    def arena(self) -> int:
        """Bytes of one block of memory that holds the whole run."""
        return max((block.offset + block.bytes for block in self.blocks), default=0)

    def at(self, step: int) -> list[Block]:
        """What is alive at a step, the largest first."""
        found = [block for block in self.blocks if block.first <= step <= block.last]
        return sorted(found, key=lambda block: -block.bytes)


def plan_memory(graph: Graph, at: Mapping[Any, int] | None = None) -> MemoryPlan:
    """The plan for a run in the graph's order; dynamic sizes as ``at`` gives them, or at their least."""
    bound = smallest_sizes(graph, at)
    line = Timeline(graph, storages(graph, bound))
    found, alive = [], [0] * (line.steps + 1)
    for value, first in line.born.items():
        if not isinstance(value, Parameter):
            size = int(product(bound(s) for s in value.shape) * item_size(value.dtype)) if value.ranked else 0
            found.append(Block(value, size, first, line.dies[value], 0))
            for step in range(first, line.dies[value] + 1):
                alive[step] += size
    return MemoryPlan(_placed(found), tuple(line.nodes), tuple(alive))


def _placed(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The blocks with offsets, in the order in which they are born."""
    placed: list[Block] = []
    for block in sorted(blocks, key=lambda block: -block.bytes):
        beside = sorted((other for other in placed if other.overlaps(block)), key=lambda other: other.offset)
        offset = _offset(block.bytes, beside)
        placed.append(Block(block.value, block.bytes, block.first, block.last, offset))
    return tuple(sorted(placed, key=lambda block: block.first))


def _offset(size: int, beside: Sequence[Block]) -> int:
    """The start of the smallest gap between blocks that takes so many bytes, or the end of the last one."""
    best, smallest, end = None, None, 0
    for other in beside:
        gap = other.offset - end
        if gap >= size and (smallest is None or gap < smallest):
            best, smallest = end, gap
        end = max(end, -(-(other.offset + other.bytes) // ALIGNMENT) * ALIGNMENT)
    return end if best is None else best


def plan_summary(plan: MemoryPlan) -> str:
    node = plan.nodes[plan.worst]
    where = "before the first node" if node is None else f"at {node.label}"
    return (
        f"{short(plan.peak)}B are alive at the peak, {where}; one block of {short(plan.arena)}B holds the run, "
        f"{short(sum(block.bytes for block in plan.blocks))}B if nothing were reused"
    )


def peak_rows(plan: MemoryPlan, most: int) -> list[list[str]]:
    """The largest values that are alive at the peak, and from which node to which they are."""
    rows = [["bytes", "value", "from", "to"]]
    for block in plan.at(plan.worst)[:most]:
        ends = [plan.nodes[step] for step in (block.first, block.last)]
        first, last = (None if node is None else node.label for node in ends)
        rows.append([f"{short(block.bytes)}B", repr(block.value), first or "the start", last or "the start"])
    return rows
