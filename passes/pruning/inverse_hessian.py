"""H^-1 of the columns of a layer, and what is left of it when some of them are removed.

With P the columns that go and K those that stay (Hassibi and Stork 1993; Kurtic et al. 2023, ZipLM, for sets of them):

    W_K -= W_P ([H^-1]_PP)^-1 [H^-1]_PK          [H^-1]_KK -= [H^-1]_KP ([H^-1]_PP)^-1 [H^-1]_PK

Of few rows X, H = X'X + r and H^-1 = (1 - X' S^-1 X) / r with S = XX' + r, [rows, rows]. The same steps
are then S -= X_P X_P' and W_K += W_P X_P' S^-1 X_K, with the new S: nothing is ever [columns, columns].
"""

from __future__ import annotations

from typing import Protocol

import torch

from regauge.passes.calibration.moments import Moments, factor_of, inverse, ridge_of


class Removal(Protocol):
    """The removal of some columns."""

    def made_up(self, rows: torch.Tensor) -> torch.Tensor:
        """What rows of weights [r, columns] become at the columns that stay, [r, columns that stay]."""
        ...


class InverseHessian(Protocol):
    """[H^-1] at some columns of a layer, however it is held."""

    def __len__(self) -> int: ...

    def diagonal(self) -> torch.Tensor:
        """[columns]."""
        ...

    def blocks(self, columns: torch.Tensor) -> torch.Tensor:
        """Those at the columns of each index, [indices, columns each] -> [indices, columns each, columns each]."""
        ...

    def copy(self) -> InverseHessian:
        """The same, of which columns may be taken out."""
        ...

    def at(self, columns: torch.Tensor) -> InverseHessian:
        """That at some of the columns, none of which is removed; it may be this itself."""
        ...

    def matrix_at(self, columns: torch.Tensor) -> DenseInverse:
        """The same as a matrix of its own: of few columns that is less."""
        ...

    def removal(self, gone: torch.Tensor, left: torch.Tensor) -> Removal:
        """What the removal of some columns makes of weights at the others; this stays as it is."""
        ...

    def take_out(self, gone: torch.Tensor, weights: torch.Tensor) -> None:
        """Remove columns in place, here and from ``weights`` [columns, r], whose other columns make up for them.

        What stands at ``gone`` afterwards means nothing. Copying what is left would take longer than the removal.
        """
        ...


def inverse_hessian(moments: Moments, share: float, dtype: torch.dtype) -> InverseHessian:
    """Of all columns, with a ridge of a ``share`` of the mean square of a column; by rows where these are few."""
    if moments.scarce and moments.columns > 2 * moments.rows:
        x = moments.kept_rows()[0]
        amount = ridge_of(float(x.square().sum()), moments.columns, share)
        x = (x - x.mean(0)).to(dtype) if len(x) else x.to(dtype)
        return InverseOfRows(x.t().contiguous(), (x @ x.t()).double(), amount)
    return DenseInverse(inverse(moments, share).to(dtype))


class DenseInverse:
    """A matrix [columns, columns]."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def __len__(self) -> int:
        return len(self.matrix)

    def diagonal(self) -> torch.Tensor:
        return self.matrix.diagonal()

    def blocks(self, columns: torch.Tensor) -> torch.Tensor:
        return self.matrix[columns[:, :, None], columns[:, None, :]]

    def copy(self) -> DenseInverse:
        return DenseInverse(self.matrix.clone())

    def at(self, columns: torch.Tensor) -> DenseInverse:
        every = len(columns) == len(self) and bool((columns == torch.arange(len(self))).all())
        return self if every else self.matrix_at(columns)

    def matrix_at(self, columns: torch.Tensor) -> DenseInverse:
        return DenseInverse(self.matrix[columns][:, columns])

    def removal(self, gone: torch.Tensor, left: torch.Tensor) -> _DenseRemoval:
        return _DenseRemoval(self.matrix, gone, left)

    def take_out(self, gone: torch.Tensor, weights: torch.Tensor) -> None:
        own = self.matrix[gone]
        factor = factors(own[:, gone])
        half = torch.linalg.solve_triangular(factor, own, upper=False)
        weights.addmm_(half.t(), torch.linalg.solve_triangular(factor, weights[gone], upper=False), alpha=-1)
        self.matrix.addmm_(half.t(), half, alpha=-1)


class _DenseRemoval:
    def __init__(self, matrix: torch.Tensor, gone: torch.Tensor, left: torch.Tensor) -> None:
        self.gone, self.left = gone, left
        own = matrix[gone]
        factor = factors(own[:, gone])
        half = torch.linalg.solve_triangular(factor, own[:, left], upper=False)
        self.solved = torch.linalg.solve_triangular(factor.mT, half, upper=True)

    def made_up(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.addmm(rows[:, self.left], rows[:, self.gone], self.solved, alpha=-1)


class InverseOfRows:
    """(1 - X' (K + r)^-1 X) / r, of centred rows X and K [rows, rows], of these and other columns.

    ``x`` is X' [columns, rows]: what is asked for is nearly always some columns. K is X X' of all columns that were not
    removed.
    """

    def __init__(
        self, x: torch.Tensor, products: torch.Tensor, amount: float, solved: torch.Tensor | None = None
    ) -> None:
        self.x, self.products, self.amount = x, products, amount
        self.solved = self._solved() if solved is None else solved  # X' (K + r)^-1

    def _solved(self) -> torch.Tensor:
        if not self.x.shape[1]:
            return self.x
        return self.x @ torch.cholesky_inverse(factor_of(self.products, self.amount)).to(self.x.dtype)

    def __len__(self) -> int:
        return len(self.x)

    def diagonal(self) -> torch.Tensor:
        return (1 - (self.x * self.solved).sum(1)) / self.amount

    def blocks(self, columns: torch.Tensor) -> torch.Tensor:
        products = self.x[columns] @ self.solved[columns].mT
        return (torch.eye(columns.shape[1], dtype=self.x.dtype) - products) / self.amount

    def copy(self) -> InverseOfRows:
        return InverseOfRows(self.x, self.products, self.amount, self.solved)

    def at(self, columns: torch.Tensor) -> InverseHessian:
        if len(columns) <= 2 * self.x.shape[1]:
            return self.matrix_at(columns)
        return InverseOfRows(self.x[columns], self.products, self.amount, self.solved[columns])

    def matrix_at(self, columns: torch.Tensor) -> DenseInverse:
        matrix = self.x[columns] @ self.solved[columns].t()
        matrix.neg_().diagonal().add_(1)
        return DenseInverse(matrix.div_(self.amount))

    def removal(self, gone: torch.Tensor, left: torch.Tensor) -> _RemovalOfRows:
        return _RemovalOfRows(self, gone, left)

    def take_out(self, gone: torch.Tensor, weights: torch.Tensor) -> None:
        own = self.x[gone]
        self.products = self.products - (own.t() @ own).double()
        self.solved = self._solved()
        weights.addmm_(self.solved, own.t() @ weights[gone])


class _RemovalOfRows:
    def __init__(self, before: InverseOfRows, gone: torch.Tensor, left: torch.Tensor) -> None:
        own = before.x[gone]
        self.gone, self.left, self.own = gone, left, own
        self.after = InverseOfRows(before.x[left], before.products - (own.t() @ own).double(), before.amount)

    def made_up(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.addmm(rows[:, self.left], rows[:, self.gone] @ self.own, self.after.solved.t())


def factors(blocks: torch.Tensor) -> torch.Tensor:
    """Cholesky factors of one matrix or many; what rounding has left indefinite gets a ridge of its own."""
    found: torch.Tensor
    found, failed = torch.linalg.cholesky_ex(blocks)
    size, tiny = blocks.shape[-1], torch.finfo(blocks.dtype).eps
    share = 10 * size * tiny
    while bool(failed.any()) and share < 1:
        level = blocks.diagonal(dim1=-2, dim2=-1).abs().amax(-1).clamp(min=torch.finfo(blocks.dtype).tiny)
        ridge = torch.diag_embed((level * share)[..., None].expand(*level.shape, size))
        found, failed = torch.linalg.cholesky_ex(blocks + ridge)
        share *= 10
    return found
