"""Patterns of zeros: which entries of a layer's matrix [outputs, columns] may be kept together.

    unstructured    any
    N:M             at most N of every M neighbours in a row; transposable: and of every M neighbours in a column
    block RxC       whole blocks of R rows by C columns

Columns are those of one place of the kernel at a time (:func:`grouped`), so that neighbours are input channels.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from regauge.ir.errors import PassError
from regauge.passes.calibration.layers import Layer
from regauge.passes.nm_mask import nm_mask
from regauge.passes.sparsity.transposable import transposable_mask

MOST_AT_ONCE = 128  # columns whose entries compete with one another (Frantar and Alistarh 2023, section 3.3)
_MOST_ENUMERATED = 70  # ways to choose N of M that are tried one by one: up to 4:8


def grouped(layer: Layer) -> torch.Tensor:
    """The columns of a layer in the order in which those of one place of the kernel stand together, channels in order.

    As the layer has them, [channels x places], neighbours are places of one channel.
    """
    return torch.arange(layer.columns).reshape(-1, layer.taps).t().reshape(-1)


class Pattern(Protocol):
    """What the solvers ask of a pattern. ``share`` is that of the entries that go, where the pattern leaves it open."""

    @property
    def step(self) -> int:
        """How many columns are decided at once, all of the groups in them."""
        ...

    def misfit(self, outputs: int, channels: int) -> str | None:
        """Why a layer cannot have the pattern."""
        ...

    def mask(self, costs: torch.Tensor, share: float) -> torch.Tensor:
        """Which entries [rows, columns] are kept, such that the sum of their costs is high."""
        ...

    def joint_mask(self, weight: torch.Tensor, inverse: torch.Tensor, rows: torch.Tensor, share: float) -> torch.Tensor:
        """Which entries are kept, by what removing the others costs once the rest of the row has made up for it.

        ``inverse`` [columns, columns] is the block of the inverse Hessian, ``rows`` [rows] what a row's error weighs.
        """
        ...

    def holds(self, kept: torch.Tensor) -> bool:
        """Whether a mask [outputs, columns] has the pattern."""
        ...


@dataclass(frozen=True)
class Unstructured:
    """Any entries; ``per_row``: as many in each row."""

    per_row: bool = False

    @property
    def step(self) -> int:
        return MOST_AT_ONCE

    def misfit(self, outputs: int, channels: int) -> str | None:
        return None

    def mask(self, costs: torch.Tensor, share: float) -> torch.Tensor:
        return _highest(costs, share) if self.per_row else _highest(costs.reshape(1, -1), share).reshape(costs.shape)

    def joint_mask(self, weight: torch.Tensor, inverse: torch.Tensor, rows: torch.Tensor, share: float) -> torch.Tensor:
        return self.mask(_single_costs(weight, inverse) * rows[:, None], share)

    def holds(self, kept: torch.Tensor) -> bool:
        return True

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NofM:
    """At most ``keep`` of every ``of`` neighbours in a row."""

    keep: int
    of: int

    @property
    def step(self) -> int:
        return self.of

    def misfit(self, outputs: int, channels: int) -> str | None:
        return None if channels % self.of == 0 else f"its inputs are no multiple of {self.of}"

    def mask(self, costs: torch.Tensor, share: float) -> torch.Tensor:
        return nm_mask(costs, 1, self.keep, self.of)

    def joint_mask(self, weight: torch.Tensor, inverse: torch.Tensor, rows: torch.Tensor, share: float) -> torch.Tensor:
        """All masks of one group are tried; for many columns at once, or too many masks, entries are taken singly."""
        masks = _masks(self.keep, self.of)
        if weight.shape[1] != self.of or not len(masks):
            return self.mask(_single_costs(weight, inverse), share)
        costs = []
        for kept in masks:
            gone = (~kept).nonzero()[:, 0]
            part = weight[:, gone]
            costs.append((part @ torch.linalg.inv(inverse[gone][:, gone]) * part).sum(1))
        return masks[torch.stack(costs, 1).argmin(1)]

    def kept(self, costs: torch.Tensor) -> torch.Tensor:
        """What the mask of each group keeps, [rows, groups]."""
        return costs.reshape(len(costs), -1, self.of).topk(self.keep, 2).values.sum(2)

    def holds(self, kept: torch.Tensor) -> bool:
        return bool((kept.reshape(len(kept), -1, self.of).sum(2) <= self.keep).all())

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


@dataclass(frozen=True)
class TransposableNofM:
    """At most ``keep`` of every ``of`` neighbours in a row, and in a column: the transposed weight has it too."""

    keep: int
    of: int

    @property
    def step(self) -> int:
        return self.of

    def misfit(self, outputs: int, channels: int) -> str | None:
        if outputs % self.of:
            return f"its outputs are no multiple of {self.of}"
        return NofM(self.keep, self.of).misfit(outputs, channels)

    def mask(self, costs: torch.Tensor, share: float) -> torch.Tensor:
        return transposable_mask(costs, self.keep, self.of)

    def joint_mask(self, weight: torch.Tensor, inverse: torch.Tensor, rows: torch.Tensor, share: float) -> torch.Tensor:
        return self.mask(_single_costs(weight, inverse) * rows[:, None], share)

    def holds(self, kept: torch.Tensor) -> bool:
        one_way = NofM(self.keep, self.of)
        return one_way.holds(kept) and one_way.holds(kept.t())

    def __str__(self) -> str:
        return f"{self.keep}:{self.of} both ways"


@dataclass(frozen=True)
class Blocks:
    """Whole blocks of ``rows`` by ``columns``."""

    rows: int
    columns: int

    @property
    def step(self) -> int:
        return max(1, MOST_AT_ONCE // self.columns) * self.columns

    def misfit(self, outputs: int, channels: int) -> str | None:
        if outputs % self.rows:
            return f"its outputs are no multiple of {self.rows}"
        return None if channels % self.columns == 0 else f"its inputs are no multiple of {self.columns}"

    def mask(self, costs: torch.Tensor, share: float) -> torch.Tensor:
        summed = self._blocks(costs).sum((1, 3))
        return self._spread(_highest(summed.reshape(1, -1), share).reshape(summed.shape))

    def joint_mask(self, weight: torch.Tensor, inverse: torch.Tensor, rows: torch.Tensor, share: float) -> torch.Tensor:
        pieces = self._blocks(weight)  # [row blocks, rows, column blocks, columns]
        size = self.columns
        diagonal = inverse.reshape(len(inverse) // size, size, -1, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        within = torch.einsum("arck,ckl,arcl->arc", pieces, torch.linalg.inv(diagonal), pieces)
        costs = (within * rows.reshape(-1, self.rows, 1)).sum(1)
        return self._spread(_highest(costs.reshape(1, -1), share).reshape(costs.shape))

    def holds(self, kept: torch.Tensor) -> bool:
        pieces = self._blocks(kept)
        return bool((pieces.any(3).any(1) == pieces.all(3).all(1)).all())

    def _blocks(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.reshape(len(matrix) // self.rows, self.rows, -1, self.columns)

    def _spread(self, kept: torch.Tensor) -> torch.Tensor:
        return kept.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def __str__(self) -> str:
        return f"blocks of {self.rows}x{self.columns}"


def parse_pattern(pattern: str, block: str, transposable: bool) -> Pattern:
    """The pattern that the options name; raises PassError where they name none."""
    if pattern == "unstructured":
        return Unstructured()
    if pattern == "block":
        sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", block)
        if sizes is None:
            raise PassError(f"block={block} is no size of a block: write block=4x4, rows by columns")
        return Blocks(int(sizes[1]), int(sizes[2]))
    parts = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern)
    if parts is None or int(parts[1]) >= int(parts[2]):
        raise PassError(
            f"pattern={pattern} is no pattern: write N:M such as 2:4, which keeps 2 of 4, or unstructured, or block"
        )
    kind = TransposableNofM if transposable else NofM
    return kind(int(parts[1]), int(parts[2]))


def _single_costs(weight: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """What the optimal brain surgeon pays for each entry alone, w^2 / [H^-1]_cc."""
    return weight.square() / inverse.diag()


def _highest(costs: torch.Tensor, share: float) -> torch.Tensor:
    """The entries of each row that stay when the lowest ``share`` goes; of equals the first go."""
    gone = costs.argsort(dim=1, stable=True)[:, : round(share * costs.shape[1])]
    return torch.ones_like(costs, dtype=torch.bool).scatter_(1, gone, False)


@lru_cache
def _masks(keep: int, of: int) -> torch.Tensor:
    """Every mask of one group, [masks, of]; none where they are too many."""
    chosen = itertools.islice(itertools.combinations(range(of), keep), _MOST_ENUMERATED + 1)
    rows = [[index in kept for index in range(of)] for kept in chosen]
    return torch.tensor(rows if len(rows) <= _MOST_ENUMERATED else []).reshape(-1, of).bool()
