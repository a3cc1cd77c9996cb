"""A run as a list of tasks, some of them run twice, and the bytes that are alive at each.

A task is a node that gives memory of its own; views go where they are read. What a task reads is what was computed
last, so that a schedule needs to say no more than which task runs when: ``[a, b, c, a, d]`` computes a again for d, and
lets go of the first one after b or c, whichever reads it last (retention intervals of Moccasin, Bartan et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from regauge.ir.cost import smallest_sizes
from regauge.ir.folding.purity import is_pure
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.memory.activations import read_from_around, returned
from regauge.ir.memory.plan import MemoryPlan, plan_memory
from regauge.ir.memory.views import storages
from regauge.ir.roofline import Device, local_seconds
from regauge.ir.running.schedule import schedule

Schedule = Sequence[int]


@dataclass(frozen=True, eq=False)
class Task:
    """A node with the memories (by number) that it reads and writes; ``inside`` are bytes that its regions take.

    ``again``: whether it may run twice; ``free``: whether it may run at any time. Those that are not keep their order.
    """

    node: Node
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    inside: int
    seconds: float
    again: bool
    free: bool


class Work:
    """The tasks of a graph and the bytes of each memory; ``given`` are inputs, ``kept`` what is returned."""

    def __init__(self, graph: Graph, device: Device, at: Mapping[Any, int] | None = None) -> None:
        self.graph = graph
        self.owner = storages(graph, smallest_sizes(graph, at))
        plan = plan_memory(graph, at)
        sizes = {block.value: block.bytes for block in plan.blocks}
        outer = [*graph.inputs, *(value for node in graph.nodes for value in node.outputs)]
        memories = [value for value in outer if value in sizes]
        self._number = {value: place for place, value in enumerate(memories)}
        self.bytes = [sizes[value] for value in memories]
        self.given = self._numbers(graph.inputs)
        self.kept = self._numbers(returned(graph))
        self._around = {node: set[Value]().union(*map(read_from_around, node.regions)) for node in graph.nodes}
        read_inside = set[Value]().union(*self._around.values())
        self._not_by_nodes = {*returned(graph), *read_inside}
        telling = {step.node for step in schedule(graph) if step.late}
        self.tells_sizes = bool(telling)
        pinned, inside = self._numbers(read_inside), _inside(graph, plan)
        self.tasks: list[Task] = []
        for node in graph.nodes:
            if not self.is_view(node):
                writes = self._numbers(value for value in node.outputs if self.owner[value] is value)
                free = is_pure(node) and not node.regions and node not in telling
                reads = self._numbers([*(value for _, value in node.operands()), *self._around[node]])
                seconds = local_seconds([node], graph, device, at)
                again = free and bool(writes) and not set(writes) & set(pinned)
                self.tasks.append(Task(node, reads, writes, inside.get(node, 0), seconds, again, free))
        self.writer = {memory: number for number, task in enumerate(self.tasks) for memory in task.writes}

    def _numbers(self, values: Iterable[Value]) -> tuple[int, ...]:
        """The memories that values lie in; those of weights are none."""
        found = dict.fromkeys(self.owner.get(value, value) for value in values)
        return tuple(self._number[value] for value in found if value in self._number)

    def read_around(self, node: Node) -> set[Value]:
        """What the regions of a node read of the graph around them."""
        return self._around[node]

    def is_view(self, node: Node) -> bool:
        """Whether all that a node gives are views, and somebody reads one."""
        read = any(value.uses or value in self._not_by_nodes for value in node.outputs)
        return read and all(self.owner[value] is not value for value in node.outputs)

    @property
    def original(self) -> list[int]:
        return list(range(len(self.tasks)))

    def spans(self, order: Schedule) -> list[tuple[int, list[int]]]:
        """Each memory that a schedule fills, as often as it does: its number, and the steps of its birth and reads.

        Inputs are given at step 0, tasks run at 1 and on; what is returned is read behind the last.
        """
        latest: dict[int, list[int]] = {memory: [0] for memory in self.given}
        found = [(memory, steps) for memory, steps in latest.items()]
        for step, number in enumerate(order, 1):
            task = self.tasks[number]
            for memory in task.reads:
                latest[memory].append(step)
            for memory in task.writes:
                latest[memory] = [step]
                found.append((memory, latest[memory]))
        for memory in self.kept:
            latest[memory].append(len(order) + 1)
        return found

    def alive(self, order: Schedule, spans: Sequence[tuple[int, list[int]]] | None = None) -> list[int]:
        """Bytes that are alive at each step, from the start on to the end."""
        change = [0] * (len(order) + 3)
        for memory, steps in self.spans(order) if spans is None else spans:
            change[steps[0]] += self.bytes[memory]
            change[steps[-1] + 1] -= self.bytes[memory]
        result = list(accumulate(change[:-1]))
        for step, number in enumerate(order, 1):
            task = self.tasks[number]
            if task.inside:
                own = sum(self.bytes[memory] for memory in task.writes)
                result[step] += max(0, task.inside - own)
        return result

    def peak(self, order: Schedule) -> int:
        return max(self.alive(order))

    def seconds(self, order: Schedule) -> float:
        """Predicted seconds of a schedule."""
        return sum(self.tasks[number].seconds for number in order)


def excess(alive: Sequence[int], budget: float) -> float:
    """By how much a run is above a budget, summed over its steps: what every change has to lower."""
    return sum(max(0, bytes_ - budget) for bytes_ in alive)


def _inside(graph: Graph, plan: MemoryPlan) -> dict[Node, int]:
    """For each node with regions the most bytes that values of these take at a time."""
    outer = {*graph.inputs, *(value for node in graph.nodes for value in node.outputs)}
    alive = [0] * len(plan.nodes)
    for block in plan.blocks:
        if block.value not in outer:
            for step in range(block.first, block.last + 1):
                alive[step] += block.bytes
    found: dict[Node, int] = {}
    nodes, current = set(graph.nodes), None
    for node, bytes_ in zip(plan.nodes, alive, strict=True):
        current = node if node in nodes else current
        if current is not None and bytes_:
            found[current] = max(bytes_, found.get(current, 0))
    return found
