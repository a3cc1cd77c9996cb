"""Weights as places in a table of few numbers, which all rows share, or neighbouring ones, or each has for itself.

Tables are found by k-means on the entries, weighted by the mean squares of their inputs where there is data (Choi et
al. 2017, Towards the Limit of Network Quantization, section 3.2, whose weights are the diagonal of the Hessian). On
data codes and tables are then bettered in turns against the output of the layer, as in JLCM (joint learning of
codebook and mapping), by coordinate descent and least squares in place of its proximal gradient steps: such steps left
1.0 to 1.9 times the error on layers of a language model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from regauge.ir.graph import Value
from regauge.passes.calibration.quadratic import Quadratic
from regauge.passes.quantization.formats import Coding, Constants, Method
from regauge.passes.quantization.grid import SCALE_BITS
from regauge.passes.quantization.rounding import by_columns, by_descent

_ROUNDS = 40  # of k-means
_NUMBERS = 1 << 24  # held at a time while tables are solved for


@dataclass(frozen=True)
class Tables:
    """``bits`` of each place; ``rows`` that share a table, None or a number that does not divide all rows: all."""

    bits: int
    rows: int | None = None

    def rounded(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> Tabled:
        rows, columns = weight.shape
        each = rows if self.rows is None or rows % self.rows else self.rows
        weighs = torch.ones(columns, dtype=torch.float64) if importance is None else importance.double()
        parts = weight.double().reshape(-1, each * columns)
        table = k_means(parts, weighs.repeat(len(parts), each), 1 << self.bits)
        codes = torch.searchsorted(_bounds(table), parts).reshape(rows, columns)
        return Tabled(self.bits, codes.double(), table)

    def fitted(self, problem: Quadratic, method: Method | None) -> Tabled:
        start = self.rounded(problem.optimum, problem.hessian.diag())
        return (by_columns if method == "columns" else by_descent)(problem, start)


@dataclass
class Tabled(Coding):
    """``codes`` [rows, columns], and ``table`` [groups of neighbouring rows, numbers], each row of it rising."""

    bits_each: int
    codes: torch.Tensor
    table: torch.Tensor

    @property
    def shared(self) -> bool:
        return len(self.table) < len(self.codes)

    @property
    def values(self) -> torch.Tensor:
        places = self.codes.long().reshape(len(self.table), -1)
        return self.table.gather(1, places).reshape(self.codes.shape)

    @property
    def bits(self) -> float:
        return self.codes.numel() * self.bits_each + self.table.numel() * SCALE_BITS

    def nearest(self, wanted: torch.Tensor, column: int) -> torch.Tensor:
        parts = wanted.reshape(len(self.table), -1).contiguous()
        return torch.searchsorted(_bounds(self.table), parts).reshape(-1).to(wanted.dtype)

    def given(self, codes: torch.Tensor, column: int) -> torch.Tensor:
        return self.table.gather(1, codes.long().reshape(len(self.table), -1)).reshape(-1)

    def with_codes(self, codes: torch.Tensor) -> Tabled:
        return replace(self, codes=codes)

    def refitted(self, problem: Quadratic) -> Tabled:
        """Least squares for the numbers of each table beside the codes; those that no code names stay."""
        groups, levels = self.table.shape
        each = len(self.codes) // groups
        wanted = problem.optimum @ problem.hessian
        step = max(1, _NUMBERS // (self.codes.shape[1] * levels))
        found = torch.empty_like(self.table)
        for group in range(groups):
            system, right = torch.zeros(levels, levels).double(), torch.zeros(levels).double()
            for first in range(group * each, (group + 1) * each, step):
                rows = slice(first, min(first + step, (group + 1) * each))
                chosen = torch.nn.functional.one_hot(self.codes[rows].long(), levels).double()
                system += torch.einsum("rcl,rcm->lm", torch.einsum("cd,rdl->rcl", problem.hessian, chosen), chosen)
                right += torch.einsum("rc,rcl->l", wanted[rows], chosen)
            amount = 1e-9 * system.diag().amax().clamp(min=1e-30)  # towards what the numbers were
            system.diagonal().add_(amount)
            found[group] = torch.linalg.solve(system, right + amount * self.table[group])
        table, order = found.sort(1)
        places = order.argsort(1).gather(1, self.codes.long().reshape(groups, -1)).reshape(self.codes.shape)
        return replace(self, codes=places.to(self.codes.dtype), table=table)

    def with_rows(self, other: Tabled, rows: torch.Tensor) -> Tabled:
        if self.shared:
            return other if bool(rows.all()) else self
        mask = rows[:, None]
        codes, table = torch.where(mask, other.codes, self.codes), torch.where(mask, other.table, self.table)
        return replace(self, codes=codes, table=table)

    def write(self, to: Constants) -> Value:
        digits = to.digits(self.codes, 1 << self.bits_each)
        found: Value = to.build.codebook(digits, to.weight("table", self.table.float()))
        return found


def _bounds(table: torch.Tensor) -> torch.Tensor:
    """Where the nearest number of a rising table changes."""
    return (table[:, 1:] + table[:, :-1]) / 2


def k_means(values: torch.Tensor, weighs: torch.Tensor, levels: int) -> torch.Tensor:
    """For each row of ``values`` [groups, n] the rising numbers [groups, levels] of least weighted squared distance.

    Lloyd's algorithm in one dimension, from evenly spaced numbers and from quantiles, the better end of the two.
    """
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    even = low + (high - low) * torch.linspace(0, 1, levels, dtype=values.dtype)
    places = ((torch.arange(levels) + 0.5) / levels * (values.shape[1] - 1)).long()
    best, least = even, torch.full((len(values),), torch.inf, dtype=values.dtype)
    for start in (even, values.sort(1).values[:, places]):
        table = start.clone()
        for _ in range(_ROUNDS):
            codes = torch.searchsorted(_bounds(table), values)
            total = torch.zeros_like(table).scatter_add_(1, codes, weighs)
            centre = torch.zeros_like(table).scatter_add_(1, codes, weighs * values) / total.clamp(min=1e-300)
            table = torch.where(total > 0, centre, table).sort(1).values
        given = table.gather(1, torch.searchsorted(_bounds(table), values))
        error = ((given - values).square() * weighs).sum(1)
        best = torch.where((error < least)[:, None], table, best)
        least = torch.minimum(least, error)
    return best
