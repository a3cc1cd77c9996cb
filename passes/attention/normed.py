"""One head of keys in the place of several where a norm goes over each head: what the norm leaves of a basis.

    score = q' D k / (|q| |k|),  D the product of both gains        k_i ~ s_i A_i k,  A_i' q reads it

RMS norms undo any scale s_i of a head, and do not see an orthogonal A_i; the score only lets those through that commute
with D. So A_i is orthogonal among indices of equal D, and a sign for one that has its own. A pair that rotary positions
turn lies between the two gains: it may be turned by an angle where each gain is one number in the pair, and both signs
changed otherwise. Heads are scaled to one size, and the joint one is their mean once each is turned towards it
(Procrustes in turns), in the metric of what they read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from regauge.ir.graph import Node, Parameter
from regauge.passes.attention.joint import Joint
from regauge.passes.attention.sites import Heads

_TURNS = 20
_EQUAL = 1e-6  # of gains


def gain_of(heads: Heads) -> torch.Tensor | None:
    """The gain [size] of the only norm of heads; None where that is no RMS norm over each head."""
    if len(heads.norms) != 1:
        return None
    node: Node = heads.norms[0]
    if node.op != "rms_norm" or node.output.shape[-1] != heads.size:
        return None
    gain = node.inputs[1] if len(node.inputs) > 1 else None
    if gain is None:
        return torch.ones(heads.size, dtype=torch.float64)
    return gain.tensor.detach().double() if isinstance(gain, Parameter) and gain.rank == 1 else None


class NormedHeads:
    """Heads of keys of which any group can become one, as :class:`regauge.passes.attention.joint.JointHeads`.

    ``weights`` [heads, size, columns], ``gains`` [2, size] those of queries and of keys, ``metric`` [columns, columns]
    of what is read, ``pairs`` [pairs, 2] that rotary positions turn. All are in double precision.
    """

    def __init__(self, weights: torch.Tensor, gains: torch.Tensor, metric: torch.Tensor, pairs: torch.Tensor) -> None:
        self.gains, self.metric, self.pairs = gains.prod(0), metric, pairs
        self.free_pairs = [_equal(gains[:, i], gains[:, j]) for i, j in pairs.tolist()]
        squares = torch.einsum("hdi,ij,hdj->h", weights, metric, weights)
        self.weights = weights / squares.clamp(min=1e-300).sqrt()[:, None, None]

    @cached_property
    def blocks(self) -> list[torch.Tensor]:
        """Indices of no pair, those of equal gains together."""
        left, found = torch.ones(len(self.gains), dtype=torch.bool), list[torch.Tensor]()
        left[self.pairs.flatten()] = False
        near = (self.gains[:, None] - self.gains).abs() <= _EQUAL * self.gains.abs().max()
        for place in range(len(near)):
            if left[place]:
                found.append((near[place] & left).nonzero()[:, 0])
                left[found[-1]] = False
        return found

    def lost(self, group: Sequence[int]) -> float:
        """What the heads are off the joint one, as a share of what all heads have."""
        joint = self.joined(group)
        off = self.weights[list(group)] - joint.back @ joint.weight
        return float(self._square(off)) / len(self.weights)

    def joined(self, group: Sequence[int]) -> Joint:
        """The mean of the heads, each turned towards it: from that head on to which the others are nearest."""
        own = self.weights[list(group)]
        starts = [self._in_turns(own, head) for head in own]
        weight, maps, _ = min(starts, key=lambda found: found[2])
        return Joint(weight, maps)

    def _in_turns(self, own: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        off = float("inf")
        for _ in range(_TURNS):
            maps = self._turns(own, weight)
            weight = (maps.mT @ own).mean(0)
            before, off = off, float(self._square(own - maps @ weight))
            if before - off <= 1e-9 * before:
                break
        return weight, maps, off

    def _square(self, off: torch.Tensor) -> torch.Tensor:
        weighed = off * self.gains.abs()[:, None]
        return torch.einsum("hdi,ij,hdj->", weighed, self.metric, weighed)

    def _turns(self, own: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A [heads, size, size] that brings ``weight`` nearest to each head, of those that the norm lets through."""
        products = own @ self.metric @ weight.mT
        found = torch.zeros_like(products)
        for block in self.blocks:
            u, _, v = torch.linalg.svd(products[:, block[:, None], block])
            found[:, block[:, None], block] = u @ v
        for (i, j), free in zip(self.pairs.tolist(), self.free_pairs, strict=True):
            share = torch.ones(2).double() if free else self.gains[[i, j]].square()
            cos = share[0] * products[:, i, i] + share[1] * products[:, j, j]
            sin = products[:, j, i] - products[:, i, j] if free else torch.zeros_like(cos)
            turn = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))
            found[:, i, i], found[:, j, j] = turn.real, turn.real
            found[:, i, j], found[:, j, i] = -turn.imag, turn.imag
        return found


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one - other).abs() <= _EQUAL * one.abs()).all())
