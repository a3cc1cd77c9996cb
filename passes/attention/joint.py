"""One head in the place of several: the subspace that serves all of them best, and how each is read off it.

    W_i ~ B_i W      minimising   sum_i  tr R_i (W_i - B_i W) C (W_i - B_i W)'

C is the second moment of what the heads read, R_i that of what their entries are multiplied by: of keys the queries, of
values the weights of the output. The solution is the singular vectors of the stacked sqrt(R_i) W_i in the metric of C
(what CLOVER, Meng et al. 2025, does to one head, over a group). W consists of sums of rows of the W_i, so that C need
not be invertible. Behind rotary positions the only maps that queries can undo are a rotation and a scale of each pair:
pairs of rows are then complex numbers, and each pair of W is the best one for that pair of all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_RANK_TOLERANCE = 1e-12  # share of the greatest eigenvalue from which a direction counts as one


@dataclass(frozen=True)
class Joint:
    """A joint head: ``weight`` [size, columns]; ``back`` [heads, size, size], head i being ``back[i] @ weight``."""

    weight: torch.Tensor
    back: torch.Tensor


class JointHeads:
    """Heads of which any group can become one.

    ``weights`` [heads, size, columns]; ``readers`` [heads, size, size] are the R_i, ``metric`` [columns, columns] is C,
    ``pairs`` [pairs, 2] says which indices of a head a rotation mixes. All are in double precision.
    """

    def __init__(self, weights: torch.Tensor, readers: torch.Tensor, metric: torch.Tensor, pairs: torch.Tensor) -> None:
        self.weights, self.pairs = weights, pairs
        free = torch.ones(weights.shape[1], dtype=torch.bool)
        free[pairs.flatten()] = False
        self.free = free.nonzero()[:, 0]
        self._parts: list[_Part] = []
        if len(self.free):
            at = self.free
            self._parts.append(_Part(weights[:, at], readers[:, at[:, None], at], metric))
        if len(pairs):
            i, j = pairs.T
            turned = torch.complex(weights[:, i], weights[:, j]).transpose(0, 1)[:, :, None]
            read = torch.stack([readers[:, at, at] for at in (i, j)]).mean(0).T[..., None, None]
            self._parts.append(_Part(turned, read.to(turned.dtype), metric.to(turned.dtype)))
        self.whole = sum(part.whole for part in self._parts)

    def read_off(self, head: int, weight: torch.Tensor) -> torch.Tensor:
        """The map B [size, size] with which B @ ``weight``, of any head [size, columns], comes closest to a head."""
        found = torch.zeros(len(weight), len(weight), dtype=torch.float64)
        maps = [part.read_off(head, self._split(weight, place)) for place, part in enumerate(self._parts)]
        if len(self.free):
            found[self.free[:, None], self.free] = maps[0]
        if len(self.pairs):
            self._put_pairs(found, maps[-1][:, 0, 0])
        return found

    def _split(self, weight: torch.Tensor, place: int) -> torch.Tensor:
        """What one of the parts has of a head."""
        if place == 0 and len(self.free):
            return weight[self.free]
        i, j = self.pairs.T
        return torch.complex(weight[i], weight[j])[:, None]

    def _put_pairs(self, maps: torch.Tensor, factors: torch.Tensor) -> None:
        """Complex factors [..., pairs] as turns and scales of pairs in maps [..., size, size]."""
        i, j = self.pairs.T
        maps[..., i, i], maps[..., j, j] = factors.real, factors.real
        maps[..., i, j], maps[..., j, i] = -factors.imag, factors.imag

    def lost(self, group: Sequence[int]) -> float:
        """The sum that is minimised for one head in place of these, as a share of what all heads have."""
        return sum(part.lost(group) for part in self._parts) / (self.whole or 1.0)

    def joined(self, group: Sequence[int]) -> Joint:
        """The head in place of these."""
        _, size, columns = self.weights.shape
        weight = torch.zeros(size, columns, dtype=torch.float64)
        back = weight.new_zeros(len(group), size, size)
        found = [part.solved(group) for part in self._parts]
        if len(self.free):
            weight[self.free], back[:, self.free[:, None], self.free] = found[0]
        if len(self.pairs):
            own, by = found[-1]
            i, j = self.pairs.T
            weight[i], weight[j] = own[:, 0].real, own[:, 0].imag
            self._put_pairs(back, by[..., 0, 0].T)
        return Joint(weight, back)


class _Part:
    """Indices that any matrix may mix: of [..., heads, size, columns], each of the leading axes by itself."""

    def __init__(self, weights: torch.Tensor, readers: torch.Tensor, metric: torch.Tensor) -> None:
        self.weights, self.metric, self.size = weights, metric, weights.shape[-2]
        self.read = _root(readers) @ weights
        stacked = self.read.flatten(-3, -2)
        self.gram = stacked @ metric @ stacked.mH
        self.whole = float(self.gram.diagonal(dim1=-2, dim2=-1).real.sum())

    def _rows(self, group: Sequence[int]) -> torch.Tensor:
        return (torch.tensor(group)[:, None] * self.size + torch.arange(self.size)).flatten()

    def lost(self, group: Sequence[int]) -> float:
        rows = self._rows(group)
        values = torch.linalg.eigvalsh(self.gram[..., rows[:, None], rows])
        return float(values[..., : -self.size].clamp_min(0).sum())

    def read_off(self, head: int, weight: torch.Tensor) -> torch.Tensor:
        given = self.metric @ weight.mH
        found: torch.Tensor = self.weights[..., head, :, :] @ given @ torch.linalg.pinv(weight @ given, hermitian=True)
        return found

    def solved(self, group: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The joint weight [..., size, columns] and the maps back [..., heads, size, size]."""
        rows = self._rows(group)
        values, vectors = torch.linalg.eigh(self.gram[..., rows[:, None], rows])
        kept, vectors = values[..., -self.size :], vectors[..., -self.size :]
        counts = kept > _RANK_TOLERANCE * values[..., -1:]
        safe = torch.where(counts, kept, 1)
        heads = torch.tensor(group)
        rows_of = (vectors.mH @ self.read[..., heads, :, :].flatten(-3, -2)) * torch.where(counts, 1.0, 0.0)[..., None]
        # scaled so that the head and what reads it share the singular values
        weight = rows_of * (safe**-0.25)[..., None]
        solved = self.metric @ (rows_of * (safe**-0.75)[..., None]).mH
        return weight, self.weights[..., heads, :, :] @ solved[..., None, :, :]


def _root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: torch.Tensor = (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mH
    return root
