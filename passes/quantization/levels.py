"""Weights as places in one table of numbers, times a scale of their row or column: for what is made floats at load.

w[r, c] ~ table[code[r, c]] * scale[r]  or  * scale[c]  or alone, whichever is nearest

Where no kernel multiplies codes, their numbers need not be evenly spaced, and outputs need not be what scales belong
to. The table is that of least weighted squared error, k-means in one dimension (Lloyd 1982, Least Squares Quantization
in PCM; Max 1960), whose error is half that of even steps for normal weights, and far less where a few weights are
large. A weight with no more different numbers than the table holds is stored as it is: windowed Fourier bases are so
beside scales of their columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from regauge.ir.graph import Value
from regauge.passes.calibration.quadratic import Quadratic
from regauge.passes.quantization.formats import Coding, Constants, Method
from regauge.passes.quantization.grid import SCALE_BITS, positive
from regauge.passes.quantization.rounding import by_columns, by_descent

ENOUGH = 8192
"""Entries of a weight beside which a table of 8 bits takes little: an eighth at most."""
_EACH = 32  # entries at least for each scale
_ROUNDS = 60  # of k-means
_DENSITY = 2048  # intervals in which the density of numbers is counted


@dataclass(frozen=True)
class Levels:
    """``bits`` of each place in the table."""

    bits: int = 8

    def rounded(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> Leveled:
        """``weight`` [rows, columns]; ``importance`` [columns] weighs squared errors."""
        data = weight.double()
        weighs = torch.ones_like(data) if importance is None else importance.double().expand_as(data).contiguous()
        size = data.abs()
        scales = [torch.ones(1, 1, dtype=data.dtype), *(positive(size.amax(axis, keepdim=True)) for axis in (1, 0))]
        few = [scale for scale in scales if scale.numel() == 1 or scale.numel() * _EACH <= data.numel()]
        found = [self._beside(data, scale, weighs) for scale in few]
        return min(found, key=lambda one: float(((one.values - data).square() * weighs).sum()))

    def _beside(self, data: torch.Tensor, scale: torch.Tensor, weighs: torch.Tensor) -> Leveled:
        units = data / scale
        table = nearest_levels(units, weighs * scale.square(), 1 << self.bits)
        if bool((data == 0).any()):  # they stay zeros
            table[table.abs().argmin()] = 0.0
        return Leveled(self, _places(table, units).double(), table, scale)

    def fitted(self, problem: Quadratic, method: Method | None) -> Leveled:
        start = self.rounded(problem.optimum, problem.hessian.diag())
        return (by_descent if method == "descent" else by_columns)(problem, start)


@dataclass
class Leveled(Coding):
    """``codes`` [rows, columns], a rising ``table`` [numbers], and ``scale`` [rows or 1, columns or 1]."""

    form: Levels
    codes: torch.Tensor
    table: torch.Tensor
    scale: torch.Tensor

    @property
    def shared(self) -> bool:
        return True

    @property
    def values(self) -> torch.Tensor:
        return self.table[self.codes.long()] * self.scale

    @property
    def bits(self) -> float:
        return self.codes.numel() * self.form.bits + (self.table.numel() + self.scale.numel()) * SCALE_BITS

    def nearest(self, wanted: torch.Tensor, column: int) -> torch.Tensor:
        return _places(self.table, wanted / self._of(column)).to(wanted.dtype)

    def given(self, codes: torch.Tensor, column: int) -> torch.Tensor:
        return self.table[codes.long()] * self._of(column)

    def _of(self, column: int) -> torch.Tensor:
        return self.scale[:, column if self.scale.shape[1] > 1 else 0]

    def with_codes(self, codes: torch.Tensor) -> Leveled:
        return replace(self, codes=codes)

    def refitted(self, problem: Quadratic) -> Leveled:
        return self

    def with_rows(self, other: Leveled, rows: torch.Tensor) -> Leveled:
        return other if bool(rows.all()) else self

    def write(self, to: Constants) -> Value:
        rows, columns = self.codes.shape
        return self.laid_out(to, (rows, columns), 0)

    def laid_out(self, to: Constants, shape: tuple[int, ...], axis: int) -> Value:
        """The weight in the shape in which a layer has it, whose ``axis`` has the rows."""
        inner = [size for at, size in enumerate(shape) if at != axis]

        def laid(part: torch.Tensor) -> torch.Tensor:
            first, rest = part.shape
            return part.reshape(first, *(inner if rest > 1 else [1] * len(inner))).movedim(0, axis).contiguous()

        table = to.weight("table", self.table.float())
        matrix: Value = to.build.codebook(to.weight("quantized", laid(self.codes).to(torch.uint8)), table)
        if self.scale.numel() == 1:
            return matrix
        found: Value = to.build.mul(matrix, to.weight("scale", laid(self.scale).float()))
        return found


def _places(table: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Where in a rising table the nearest numbers are."""
    return torch.searchsorted((table[1:] + table[:-1]) / 2, values.contiguous())


def nearest_levels(values: torch.Tensor, weighs: torch.Tensor, count: int) -> torch.Tensor:
    """The rising numbers [count] of least weighted squared distance to ``values`` (any shape).

    Lloyd's algorithm from evenly spaced numbers, from as many as the cube root of the density asks for (Panter and Dite
    1951), and from what the greatest gaps part; the best end of the three.
    """
    line, order = values.flatten().sort()
    amounts = weighs.expand_as(values).flatten()[order]
    mass = torch.cat([amounts.new_zeros(1), amounts.cumsum(0)])
    moment = torch.cat([amounts.new_zeros(1), (amounts * line).cumsum(0)])
    best, least = line[:1].expand(count).clone(), torch.inf
    for start in (_even(line, count), _by_density(line, amounts, count), _by_gaps(line, count)):
        table = start
        for _ in range(_ROUNDS):
            inner = torch.searchsorted(line, (table[1:] + table[:-1]) / 2)
            ends = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(line))])
            total, sums = mass[ends].diff(), moment[ends].diff()
            moved = torch.where(total > 0, sums / total.clamp(min=1e-300), table).sort().values
            if torch.equal(moved, table):
                break
            table = moved
        error = float(((table[_places(table, line)] - line).square() * amounts).sum())
        if error < least:
            best, least = table, error
    return best


def _even(line: torch.Tensor, count: int) -> torch.Tensor:
    return line[0] + (line[-1] - line[0]) * torch.linspace(0, 1, count, dtype=line.dtype)


def _by_density(line: torch.Tensor, amounts: torch.Tensor, count: int) -> torch.Tensor:
    width = (line[-1] - line[0]) / _DENSITY
    if not float(width):
        return _even(line, count)
    cells = ((line - line[0]) / width).long().clamp(max=_DENSITY - 1)
    density = torch.zeros(_DENSITY, dtype=line.dtype).scatter_add_(0, cells, amounts)
    share = (density ** (1 / 3)).cumsum(0)
    wanted = (torch.arange(count, dtype=line.dtype) + 0.5) / count * share[-1]
    return line[0] + width * (torch.searchsorted(share, wanted).clamp(max=_DENSITY - 1) + 0.5)


def _by_gaps(line: torch.Tensor, count: int) -> torch.Tensor:
    gaps = line.diff()
    cuts = gaps.topk(min(count - 1, len(gaps))).indices.sort().values + 1
    ends = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(line))])
    sums = torch.cat([line.new_zeros(1), line.cumsum(0)])
    means = sums[ends].diff() / ends.diff()
    return torch.cat([means, means[-1:].expand(count - len(means))])
