"""The base of sparsifiers of bonds, which find the ranks of factor pairs and heads while training.

At the end bonds are brought into singular form and cut to the ranks that were found
(:mod:`regauge.passes.factorization.balance`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.groups import Member
from regauge.ir.dims.resize import resize
from regauge.ir.errors import PassError
from regauge.ir.gauge.frames import Frame, find_frames
from regauge.ir.graph import Graph, Parameter
from regauge.passes.factorization.balance import balance_frame, is_bond
from regauge.passes.name_patterns import matches
from regauge.passes.training.places import along_axis, laid_along, multiplied, sums_by_index
from regauge.passes.training.sparsifier import Sparsifier


@dataclass(frozen=True, eq=False)
class Bond:
    """An axis with a free basis: the weights that write it, and those that read it."""

    frame: Frame
    sides: tuple[tuple[Member, ...], tuple[Member, ...]]

    @property
    def dim(self) -> Dim:
        return self.frame.dim

    @property
    def size(self) -> int:
        return int(self.dim.size)


class BondSparsifier(Sparsifier):
    """A sparsifier that finds the ``ranks`` of bonds; ``include`` are globs on names of their weights, by default all.

    Raises PassError where the graph has no bond.
    """

    def __init__(self, model: nn.Module, graph: Graph, include: tuple[str, ...]) -> None:
        super().__init__(model, graph)
        trained = set(self.bound.trained())
        self.bonds: list[Bond] = []
        for frame in find_frames(graph):
            writers, readers = (
                tuple(dict.fromkeys(Member(side.parameter, side.axis) for side in own))
                for own in (frame.writers, frame.readers)
            )
            own = {member.parameter for member in (*writers, *readers)}
            named = not include or matches([parameter.name for parameter in own], include)
            if named and own <= trained and is_bond(frame, self.left):
                self.bonds.append(Bond(frame, (writers, readers)))
        if not self.bonds:
            raise PassError(
                f"{type(self).__name__} finds no bond to train: factorize layers first, or see `regauge explain`"
            )
        self.ranks = {bond: bond.size for bond in self.bonds}

    def squares(self, bond: Bond, side: int) -> torch.Tensor:
        """The squared norm of each index in the weights that write it (0) or read it (1), [indices]."""
        parts = [
            sums_by_index(
                self.graph.axes.of[m.parameter][m.axis],
                along_axis(self.bound.tensor(m.parameter).float().square(), m.axis),
                bond.dim,
            )
            for m in bond.sides[side]
        ]
        return torch.stack(parts).sum(0)

    def cut_to(self, ranks: Mapping[Bond, int]) -> dict[Parameter, torch.Tensor]:
        """The module's weights beside bonds with zeros behind the first indices of each; gradients go through."""
        masks: dict[Member, dict[Dim, torch.Tensor]] = {}
        for bond, rank in ranks.items():
            if rank < bond.size:
                mask = (torch.arange(bond.size, device=self._device) < rank).float()
                for member in (*bond.sides[0], *bond.sides[1]):
                    masks.setdefault(member, {})[bond.dim] = mask
        along: dict[Parameter, dict[int, torch.Tensor]] = {}
        for member, own in masks.items():
            vector = laid_along(self.graph.axes.of[member.parameter][member.axis], own)
            if vector is not None:
                along.setdefault(member.parameter, {})[member.axis] = vector
        return {p: multiplied(self.bound.tensor(p), axes) for p, axes in along.items()}

    def truncate(self) -> None:
        """Set what lies behind the ranks to zero in the module."""
        for parameter, tensor in self.cut_to(self.ranks).items():
            self.bound.tensor(parameter).copy_(tensor)

    def _finish(self) -> Graph:
        self.truncate()
        trained = self.bound.trained_graph(self.name)
        result = trained.copy()
        names = {bond.dim.name: rank for bond, rank in self.ranks.items()}
        frames = [frame for frame in find_frames(trained) if frame.dim.name in names and is_bond(frame, self.left)]
        for frame in frames:
            balance_frame(trained, result, frame, {}, by=self.name)
        keep = {bond.dim.name: range(rank) for bond, rank in self.ranks.items() if rank < bond.size}
        return resize(result, keep, by=self.name) if keep else result

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ranks": {bond.dim.name: rank for bond, rank in self.ranks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.ranks = {bond: int(state["ranks"][bond.dim.name]) for bond in self.bonds}
