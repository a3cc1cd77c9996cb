"""Metrics of inputs: as matrices, or, where there is little data, as the rows that they are the moments of.

    A = X'X + D (x) I        X: [rows, inner, rest], of a column its two axes; D: [inner, inner], or a number of ones

The rows are smaller than their moments, and products with them take less, as long as they are fewer than half of the
columns. A plain metric has no rows at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Gram:
    """The metric of columns [inner, rest]: ``full`` [inner, rest, inner, rest], or ``rows`` and a ``ridge`` D.

    All in double precision.
    """

    full: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    ridge: float | torch.Tensor = 0.0

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Gram:
        """A matrix [columns, columns]."""
        return cls(matrix[:, None, :, None])

    @classmethod
    def of_rows(cls, rows: torch.Tensor, ridge: float) -> Gram:
        """The moments of rows [rows, columns], with a ridge."""
        return cls(rows=rows[:, :, None], ridge=ridge)

    @classmethod
    def plain(cls, columns: int) -> Gram:
        """The identity."""
        return cls.of_rows(torch.zeros(0, columns, dtype=torch.float64), 1.0)

    @property
    def shape(self) -> tuple[int, int]:
        """inner, rest"""
        known = self.full if self.rows is None else self.rows
        assert known is not None
        return known.shape[-2], known.shape[-1]

    def unfolded(self, sizes: Sequence[int], order: Sequence[int], inner: int) -> Gram:
        """With the columns, which have axes of ``sizes``, in another order of these, the first of which are ``inner``
        indices."""
        rest = prod(sizes) // inner
        if self.rows is not None:
            grid = self.rows.reshape(len(self.rows), *sizes).permute(0, *(axis + 1 for axis in order))
            return Gram(rows=grid.reshape(len(self.rows), inner, rest), ridge=self.ridge)
        assert self.full is not None
        both = [*order, *(axis + len(sizes) for axis in order)]
        return Gram(self.full.reshape(*sizes, *sizes).permute(both).reshape(inner, rest, inner, rest))

    def weighed(self, change: torch.Tensor, outputs: torch.Tensor | None = None) -> torch.Tensor:
        """``change`` [n, inner, rest] times the metric, and in front times one of outputs [n, n]."""
        flat = change.reshape(len(change), -1)
        if self.rows is None:
            assert self.full is not None
            found = flat @ self.full.reshape(flat.shape[1], -1)
            return (found if outputs is None else outputs @ found).reshape(change.shape)
        found = torch.zeros_like(flat)
        if len(self.rows):
            rows = self.rows.flatten(1)
            seen = flat @ rows.t()
            found = (seen if outputs is None else outputs @ seen) @ rows
        if isinstance(self.ridge, torch.Tensor) or self.ridge:
            plain = self.ridge @ change if isinstance(self.ridge, torch.Tensor) else self.ridge * change
            found += plain.reshape(flat.shape) if outputs is None else outputs @ plain.reshape(flat.shape)
        return found.reshape(change.shape)

    def beside(self, core: torch.Tensor, outputs: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
        """What a first link [rank, inner] is multiplied by in the error beside a core [n, rank, rest] behind it."""
        flat = core.flatten(1)
        left = flat if outputs is None else outputs @ flat

        def by_rows(first: torch.Tensor) -> torch.Tensor:
            found = torch.zeros_like(first)
            if len(rows):
                seen = torch.einsum("nir,pi->npr", rows, first)
                back = (seen.flatten(1) @ flat.t() @ left).reshape(seen.shape)
                found = torch.einsum("npr,nir->pi", back, rows)
            return found.add_(plain @ first) if self.ridge else found

        def by_matrix(first: torch.Tensor) -> torch.Tensor:
            image = self.weighed(torch.einsum("opr,pi->oir", core, first))
            return torch.einsum("opr,oir->pi", left.reshape(core.shape), image)

        if self.rows is None:
            return by_matrix
        assert isinstance(self.ridge, float)
        rows, plain = self.rows, self.ridge * torch.einsum("opr,oqr->pq", core, left.reshape(core.shape))
        return by_rows

    def matrix(self) -> torch.Tensor:
        """[inner x rest, inner x rest]"""
        if self.rows is None:
            assert self.full is not None
            return self.full.reshape(2 * [prod(self.shape)])
        rows = self.rows.flatten(1)
        found = rows.t() @ rows
        if isinstance(self.ridge, torch.Tensor):
            found += torch.kron(self.ridge, torch.eye(self.rows.shape[2], dtype=found.dtype))
        else:
            found.diagonal().add_(self.ridge)
        return found

    def behind(self, first: torch.Tensor) -> Gram:
        """That of what a map ``first`` [rank, inner] of the inner axis gives."""
        if self.rows is None:
            assert self.full is not None
            image = torch.einsum("pi,irjs->prjs", first, self.full)
            return Gram(torch.einsum("prjs,qj->prqs", image, first))
        ridge = self.ridge
        if isinstance(ridge, torch.Tensor) or ridge:
            ridge = first @ (ridge @ first.t() if isinstance(ridge, torch.Tensor) else ridge * first.t())
        found = Gram(rows=torch.einsum("pi,nir->npr", first, self.rows).contiguous(), ridge=ridge)
        size = len(first) * self.rows.shape[2]
        return (
            found if 2 * len(self.rows) < size else Gram(found.matrix().reshape(2 * (len(first), self.rows.shape[2])))
        )

    def turned(self, basis: torch.Tensor) -> Gram:
        """The same in another orthonormal basis [inner, inner] of the inner axis."""
        if self.rows is None:
            return self.behind(basis)
        assert isinstance(self.ridge, float)
        return Gram(rows=torch.einsum("pi,nir->npr", basis, self.rows).contiguous(), ridge=self.ridge)

    def over_rest(self) -> torch.Tensor:
        """What it adds up to over the rest of the column, [inner, inner]."""
        if self.rows is None:
            assert self.full is not None
            return torch.einsum("irjr->ij", self.full)
        found = torch.einsum("nir,njr->ij", self.rows, self.rows)
        count = self.rows.shape[2]
        if isinstance(self.ridge, torch.Tensor):
            return found + count * self.ridge
        found.diagonal().add_(count * self.ridge)
        return found

    def over_inner(self) -> torch.Tensor:
        """What it adds up to over the inner axis, [rest, rest]."""
        if self.rows is None:
            assert self.full is not None
            return torch.einsum("iris->rs", self.full)
        found = torch.einsum("nir,nis->rs", self.rows, self.rows)
        trace = self.ridge.trace() if isinstance(self.ridge, torch.Tensor) else self.ridge * self.rows.shape[1]
        found.diagonal().add_(trace)
        return found
