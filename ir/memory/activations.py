"""Activation memory of one run of a graph: what every value takes, and how much is alive at a time.

Nodes run in the graph's order. A value lives from the node that gives it to the last one that reads it; graph outputs
and new values of states stay; graph inputs are there from the start. A value that torch gives as a view of another one
shares its memory (:mod:`regauge.ir.memory.views`), which lives as long as any of them; nothing is written over. Regions
(branches, loop bodies) run between the reading and the giving of their node, one after the other, once; their inputs
are the node's operands, and what they read of the graph around them stays until their node is done. Weights are not
counted, nor what lies in them. What is fused takes none but for its results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from regauge.ir.cost import CostModel, computed_inside, item_size, sized
from regauge.ir.dims.extents import Dim, Extent, leaves
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.memory.views import storages
from regauge.ir.sizes.expressions import product


class Timeline:
    """When the memory of values is alive, regions included: from step ``born[value]`` to step ``dies[value]``.

    ``owner`` tells in whose memory a value lies; views have no entry of their own. ``nodes`` are those that run at each
    step (None: graph inputs are given).
    """

    def __init__(self, graph: Graph, owner: Mapping[Value, Value]) -> None:
        self.owner = owner
        self.steps = 0
        self.nodes: list[Node | None] = [None]
        self.born: dict[Value, int] = {}
        self.dies: dict[Value, int] = {}
        for value in graph.inputs:
            self._bear(value)
        self._walk(graph)
        for value in returned(graph):
            self._use(value)

    def _bear(self, value: Value) -> None:
        if self.owner[value] is value:
            self.born[value] = self.dies[value] = self.steps
        else:
            self._use(value)

    def _use(self, value: Any) -> None:
        owner = self.owner.get(value)
        if owner in self.born:
            self.dies[owner] = self.steps

    def _walk(self, graph: Graph) -> None:
        for node in graph.nodes:
            self._step(node)
            inside = [self._region(region, node) for region in node.regions if not computed_inside(node)]
            for value in {value for _, value in node.operands()}.union(*inside):
                self._use(value)
            for value in node.outputs:
                self._bear(value)

    def _step(self, node: Node) -> None:
        self.steps += 1
        self.nodes.append(node)

    def _region(self, region: Graph, node: Node) -> set[Value]:
        """Walk a region; returns the values that it reads of the graphs around it."""
        self._walk(region)
        for value in returned(region):
            self._use(value)
        self._step(node)
        return read_from_around(region)


def read_from_around(region: Graph) -> set[Value]:
    """The values that a region reads of the graphs around it, other than by its inputs."""
    own = {value for part in region.nested() for value in [*part.inputs, *_results(part)]}
    read = {value for _, node in region.walk() for _, value in node.operands()} | set(returned(region))
    return read - own


def returned(graph: Graph) -> Iterator[Value]:
    """What a graph gives to its caller: outputs that are values, and new values of states."""
    yield from (output for output in graph.outputs if isinstance(output, Value))
    yield from (state.after for state in graph.states)


def _results(graph: Graph) -> Iterator[Value]:
    for node in graph.nodes:
        yield from node.outputs


class PeakMemory:
    """Bytes that are alive at the worst moment of a run, while sizes of Dims change (a :class:`regauge.ir.cost.Meter`).

    A change costs time in proportion to the number of values.
    """

    def __init__(self, model: CostModel) -> None:
        self._number = model.number
        line = Timeline(model.graph, storages(model.graph, model.bound))
        values = [value for value in line.born if not isinstance(value, Parameter)]
        self._axes = [model.axes(value) for value in values]
        self._item = [item_size(value.dtype) for value in values]
        self._born = np.array([line.born[value] for value in values], dtype=np.int64)
        self._gone = np.array([line.dies[value] + 1 for value in values], dtype=np.int64)
        self._steps = line.steps + 2
        self._sizes: dict[Dim, int] = {}
        self._bytes = np.array([self._bytes_of(index) for index in range(len(values))], dtype=np.float64)
        self._holding: dict[Dim, list[int]] = {}
        for index, axes in enumerate(self._axes):
            for dim in {dim for extent in axes for dim in leaves(extent)}:
                self._holding.setdefault(dim, []).append(index)
        self.all_values = float(self._bytes.sum())
        self.original = self.total = self._peak(self._bytes)

    def _size_of(self, dim: Dim) -> int:
        found = self._sizes.get(dim)
        return self._number(dim) if found is None else found

    def _bytes_of(self, index: int) -> float:
        axes: list[Extent] = self._axes[index]
        return float(product(sized(extent, self._size_of) for extent in axes)) * self._item[index]

    def _peak(self, sizes: np.ndarray) -> float:
        change = np.bincount(self._born, sizes, self._steps) - np.bincount(self._gone, sizes, self._steps)
        return float(np.cumsum(change).max(initial=0.0))

    def set_sizes(self, sizes: Mapping[Dim, int]) -> float:
        """Give Dims new sizes; returns the new peak."""
        changed = [dim for dim, size in sizes.items() if self._size_of(dim) != size]
        self._sizes.update(sizes)
        self._renew(self._bytes, changed)
        self.total = self._peak(self._bytes)
        return self.total

    def with_size(self, dim: Dim, size: int) -> float:
        """The peak if one Dim had another size."""
        before = self._size_of(dim)
        self._sizes[dim] = size
        trial = self._bytes.copy()
        self._renew(trial, [dim])
        self._sizes[dim] = before
        return self._peak(trial)

    def _renew(self, sizes: np.ndarray, dims: list[Dim]) -> None:
        for index in dict.fromkeys(i for dim in dims for i in self._holding.get(dim, ())):
            sizes[index] = self._bytes_of(index)


def activation_bytes(graph: Graph, at: Mapping[Any, int] | None = None) -> tuple[int, int]:
    """Bytes of all values together, views not counted, and at the moment when most are alive (in graph order).

    Dynamic sizes have the values that ``at`` gives, by symbol, or the least they may have.
    """
    found = PeakMemory(CostModel(graph, at))
    return int(found.all_values), int(found.total)
