"""Weights as signs, each of one bit, times magnitudes of low rank.

    w ~ sign(w) * (a b')        y = ((x b) sign(w)') a        OneBit (Xu et al. 2024), SVID

SVID is sign-value-independent decomposition: a [rows] and b [columns] are the greatest singular pair of |w|, which has
no negative entry. On data signs make up for one another column by column, and in turns with them a and b are those of
least squares: without the training that OneBit follows up with. Both vectors are stored in half precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from regauge.ir.graph import Value
from regauge.passes.calibration.quadratic import Quadratic
from regauge.passes.quantization.formats import Coding, Constants, Method
from regauge.passes.quantization.rounding import best_scales, by_columns, by_descent

HALF_BITS = 16


def as_half(tensor: torch.Tensor) -> torch.Tensor:
    """As it will be stored."""
    return tensor.half().to(tensor.dtype)


def factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best product u v of a rank, u [rows, rank] and v [rank, columns] of like sizes."""
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    root = sizes[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


@dataclass(frozen=True)
class OneBit:
    """A bit for each entry, a number for each row and one for each column."""

    def rounded(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> Signed:
        whole = weight.double()
        weighs = torch.ones(whole.shape[1], dtype=torch.float64) if importance is None else importance.double().sqrt()
        u, v = factors(whole.abs() * weighs, 1)
        a, b = u[:, 0].abs(), v[0].abs() / weighs.clamp(min=1e-30)
        return Signed(torch.where(whole < 0, -1.0, 1.0), as_half(a), as_half(b))

    def fitted(self, problem: Quadratic, method: Method | None) -> Signed:
        start = self.rounded(problem.optimum, problem.hessian.diag())
        return (by_columns if method == "columns" else by_descent)(problem, start)


@dataclass
class Signed(Coding):
    """``codes`` [rows, columns] are signs, ``a`` [rows] and ``b`` [columns] magnitudes."""

    codes: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor

    @property
    def shared(self) -> bool:
        return True

    @property
    def values(self) -> torch.Tensor:
        return self.codes * torch.outer(self.a, self.b)

    @property
    def bits(self) -> float:
        return self.codes.numel() + HALF_BITS * (len(self.a) + len(self.b))

    def nearest(self, wanted: torch.Tensor, column: int) -> torch.Tensor:
        return torch.where(wanted < 0, -1.0, 1.0).to(wanted.dtype)

    def given(self, codes: torch.Tensor, column: int) -> torch.Tensor:
        return codes * self.a * self.b[column]

    def with_codes(self, codes: torch.Tensor) -> Signed:
        return replace(self, codes=codes)

    def refitted(self, problem: Quadratic) -> Signed:
        """Least squares for a beside signs and b, then for b; a column that it would turn around is."""
        a = best_scales(problem, self.codes * self.b, self.a[:, None])
        units = self.codes * a
        system = problem.hessian * (units.t() @ units)
        system.diagonal().add_(1e-9 * system.diag().amax().clamp(min=1e-30))
        b = torch.linalg.solve(system, (units * (problem.optimum @ problem.hessian)).sum(0))
        turned = torch.where(b < 0, -1.0, 1.0).to(b.dtype)
        return Signed(self.codes * turned, as_half(a[:, 0]), as_half(b.abs()))

    def with_rows(self, other: Signed, rows: torch.Tensor) -> Signed:
        return other if bool(rows.all()) else self

    def write(self, to: Constants) -> Value:
        scaled = to.build.mul(signs(to, self.codes), to.half("a", self.a[:, None]))
        found: Value = to.build.mul(scaled, to.half("b", self.b))
        return found

    def product(self, to: Constants, x: Value) -> Value | None:
        inside = to.build.mul(x, to.half("b", self.b))
        y = to.build.linear(inside, signs(to, self.codes))
        found: Value = to.build.mul(y, to.half("a", self.a))
        return found


def signs(to: Constants, codes: torch.Tensor) -> Value:
    """Signs [rows, columns], eight to a byte, as numbers of single precision."""
    table = to.buffer("signs", torch.tensor([[-1.0, 1.0]]))
    found: Value = to.build.codebook(to.digits(codes > 0, 2), table)
    return found
