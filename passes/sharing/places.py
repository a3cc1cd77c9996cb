"""The Dims and frames that belong to one block alone, by what stands for them in the other blocks.

A Dim is private to a block where every weight that has it is the block's own; a frame (:mod:`regauge.ir.gauge.frames`)
where every weight that writes or reads it is. Both are known by the roles of these weights in the block, so that those
of one structure are found in each block of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.dims.reorder import may_be_reordered
from regauge.ir.gauge.frames import Frame, Side, find_frames
from regauge.ir.gauge.insertion import fibres, within
from regauge.ir.graph import Graph, Parameter

_Kind = TypeVar("_Kind")


@dataclass
class Private:
    """The graph, and the names of the own weights of each block, in corresponding order."""

    graph: Graph
    names: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        self.weights = [[self.graph.parameters[name] for name in own] for own in self.names]
        self.roles = [{weight: role for role, weight in enumerate(own)} for own in self.weights]

    def dims(self) -> list[list[Dim]]:
        """The Dims that may be reordered and that all blocks have, each as it is in every block."""
        free = set(may_be_reordered(self.graph, [group.dim for group in self.graph.groups() if group.free]))
        found: list[dict[Hashable, Dim]] = [{} for _ in self.weights]
        for group in self.graph.groups():
            block = self._block(member.parameter for member in group.members)
            if block is not None and group.dim in free:
                sides = frozenset(self._sides(block, self.sides(block, group.dim)))
                found[block][sides] = group.dim
        return _in_all(found)

    def frames(self) -> list[list[Frame]]:
        """The frames that all blocks have, each as it is in every block."""
        found: list[dict[Hashable, Frame]] = [{} for _ in self.weights]
        for frame in find_frames(self.graph):
            block = self._block(side.parameter for side in (*frame.writers, *frame.readers))
            if block is not None:
                key = (frozenset(self._sides(block, frame.writers)), frozenset(self._sides(block, frame.readers)))
                found[block][key] = frame
        return _in_all(found)

    def sides(self, block: int, dim: Dim) -> list[Side]:
        """Every place of a Dim in the weights of a block, in the order of their roles."""
        return [
            Side(weight, axis, number)
            for weight in self.weights[block]
            for axis, extent in enumerate(self.graph.axes.of[weight])
            for number, leaf in enumerate(leaves(extent))
            if leaf is dim
        ]

    def rows(self, sides: Iterable[Side]) -> torch.Tensor:
        """What weights have for each index of a Dim, side by side: [size, entries]."""
        found = []
        for weight, axis, number in sides:
            positions = torch.from_numpy(fibres(self.graph.axes.of[weight][axis], number))
            own = weight.tensor.detach().double().cpu().movedim(axis, 0)[positions]
            found.append(own.reshape(len(positions), -1))
        return torch.cat(found, 1)

    def along(self, block: int, frame: Frame, sides: Sequence[Side]) -> torch.Tensor:
        """What weights have for each index of a frame, side by side: [indices of its majors, size, entries]."""
        found = []
        for side in sorted(sides, key=lambda side: (self.roles[block][side.parameter], side.axis, side.number)):
            found.append(within(self.graph, frame, side, side.parameter.tensor.detach().double().cpu())[0])
        return torch.cat(found, 2)

    def _block(self, weights: Iterable[Parameter]) -> int | None:
        """The block that owns all of these."""
        read = set(weights)
        return next((block for block, own in enumerate(self.roles) if read and read <= own.keys()), None)

    def _sides(self, block: int, sides: Iterable[Side]) -> list[tuple[int, int, int]]:
        return [(self.roles[block][weight], axis, number) for weight, axis, number in sides]


def _in_all(found: Sequence[Mapping[Hashable, _Kind]]) -> list[list[_Kind]]:
    return [[own[key] for own in found] for key in found[0] if all(key in own for own in found)]
