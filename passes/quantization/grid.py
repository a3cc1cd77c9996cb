"""Grids of numbers, and matrices rounded to them: codes with a scale for each row, or for groups of its columns.

w ~ (code - zero) * scale        symmetric: no zero, codes -2^(b-1) ... 2^(b-1) - 1;  else codes 0 ... 2^b - 1
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch

from regauge.ir.graph import Value
from regauge.passes.calibration.quadratic import Quadratic
from regauge.passes.quantization.formats import Coding, Constants, Method
from regauge.passes.quantization.rounding import best_scales, by_columns, by_descent

_SHRINKS = torch.linspace(1.0, 0.35, 27, dtype=torch.float64)  # shares of the range that are tried
_TURNS = 12  # of codes and scales, where scales are those of least squares
SCALE_BITS = 32
_AT_ONCE = 1 << 21  # entries
_SHARING = 4  # bits at most of codes that lie together in a byte

Scales: TypeAlias = Literal["searched", "whole", "least", "mean", "median", "powers"]
"""How scales are found: the best share of the range, or all of it; least squares from the mean of magnitudes on; that
mean or median itself (BitNet b1.58); the power of two that just holds the greatest entry (block floating point)."""


@dataclass(frozen=True)
class Grid:
    """The integers of so many bits."""

    bits: int
    symmetric: bool = True

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        return self.low + (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The type that codes are held in."""
        if self.bits > 8:
            return torch.int16 if self.symmetric else torch.uint16
        return torch.int8 if self.symmetric else torch.uint8

    @property
    def few_bits(self) -> int | None:
        """How many bits codes have where several of them can lie in a byte."""
        return self.bits if self.bits <= _SHARING else None

    @property
    def table(self) -> torch.Tensor | None:
        """The numbers, where codes are places among them; None where codes are the numbers."""
        return None

    @property
    def free_scales(self) -> bool:
        """Whether any scale will do."""
        return True

    @property
    def fixed(self) -> bool:
        """Whether scales are the same whatever the range."""
        return False

    def span(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of ranges, which are widened to hold 0: it must stay 0."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            scale = torch.maximum(-low / -self.low, high / self.high)
            return positive(scale), torch.zeros_like(scale)
        scale = positive((high - low) / (self.high - self.low))
        return scale, torch.round(-low / scale).clamp(self.low, self.high)

    def codes(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest integers, halves to even, in the type of ``x``."""
        return (torch.round(x / scale) + zero).clamp(self.low, self.high)

    def digits(self, codes: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Codes as numbers from 0 to below a base, and that base."""
        return codes - self.low, self.high - self.low + 1


@dataclass(frozen=True)
class Ternary(Grid):
    """-1, 0 and 1."""

    bits: int = 2

    @property
    def low(self) -> int:
        return -1

    @property
    def high(self) -> int:
        return 1


def positive(scale: torch.Tensor) -> torch.Tensor:
    """A scale of 1 where all entries are 0."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


@dataclass(frozen=True)
class Form:
    """How a matrix is stored: on a grid, with a scale for each ``group`` of neighbouring columns of a row, or one
    ``shared`` by all rows, whose groups are whole rows then. ``zeros`` [rows, columns]: the entries that stay zero,
    whatever the others make up for."""

    grid: Grid
    group: int
    scales: Scales = "searched"
    shared: bool = False
    zeros: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def rounded(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> Coded:
        rows, columns = weight.shape
        most = max(1, _AT_ONCE // max(1, columns))
        if rows > most and not self.shared:
            return self._in_parts(weight, importance, most)
        weighs = torch.ones(columns, dtype=torch.float64) if importance is None else importance.double()
        whole = weight.double() if self.zeros is None else weight.double().masked_fill(self.zeros, 0)
        if self.shared:
            parts, weighs = whole.reshape(1, 1, -1), weighs.repeat(rows).reshape(1, 1, -1)
        else:
            parts, weighs = whole.reshape(rows, -1, self.group), weighs.reshape(1, -1, self.group)
        scale, zero = self._scales(parts, weighs)
        if self.shared:
            scale, zero = scale.expand(rows, 1), zero.expand(rows, 1)
        coded = Coded(self, whole, scale, zero)
        return coded.with_codes(self.grid.codes(whole, coded.spread(scale), coded.spread(zero)))

    def _in_parts(self, weight: torch.Tensor, importance: torch.Tensor | None, count: int) -> Coded:
        """The same, so many rows at a time: what is tried takes several times the memory of the rows."""
        found = []
        for first in range(0, len(weight), count):
            rows = slice(first, first + count)
            form = self if self.zeros is None else replace(self, zeros=self.zeros[rows])
            found.append(form.rounded(weight[rows], importance))
        codes, scale, zero = (torch.cat([getattr(one, name) for one in found]) for name in ("codes", "scale", "zero"))
        return Coded(self, codes, scale, zero)

    def fitted(self, problem: Quadratic, method: Method | None) -> Coded:
        """Rounding to 8 bits loses too little for descent, unless that is asked for."""
        start = self.rounded(problem.optimum, problem.hessian.diag())
        columns = method == "columns" or method is None and self.grid.bits >= 8
        return (by_columns if columns else by_descent)(problem, start)

    def _scales(self, parts: torch.Tensor, weighs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero [rows, groups] of parts [rows, groups, columns]."""
        if self.scales == "searched":
            return _searched(self.grid, parts, weighs)
        if self.scales == "whole":
            return self.grid.span(parts.amin(2), parts.amax(2))
        sizes = parts.abs()
        if self.scales == "powers":
            room = self.grid.bits - 2
            scale = torch.exp2(torch.floor(torch.log2(positive(sizes.amax(2)))) - room)
        else:
            scale = positive(sizes.median(2).values if self.scales == "median" else sizes.mean(2))
        zero = torch.zeros_like(scale)
        if self.scales == "least":
            for _ in range(_TURNS):
                codes = self.grid.codes(parts, scale[..., None], zero[..., None])
                fit = (weighs * codes * parts).sum(2) / (weighs * codes.square()).sum(2).clamp(min=1e-300)
                scale = torch.where(fit > 0, fit, scale)
        return scale, zero


@dataclass
class Coded(Coding):
    """A matrix [rows, columns] in a form; ``scale`` and ``zero`` are [rows, groups] of neighbouring columns."""

    form: Form
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    @property
    def grid(self) -> Grid:
        return self.form.grid

    @property
    def shared(self) -> bool:
        return self.form.shared

    @property
    def group(self) -> int:
        """Columns in a group."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def values(self) -> torch.Tensor:
        """[rows, columns]: the numbers that the codes stand for."""
        return (self.codes - self.spread(self.zero)) * self.spread(self.scale)

    @property
    def bits(self) -> float:
        each = SCALE_BITS + (0 if self.grid.symmetric else self.grid.bits)
        return self.codes.numel() * self.grid.bits + each * (1 if self.shared else self.scale.numel())

    def spread(self, by_group: torch.Tensor) -> torch.Tensor:
        """[rows, groups] as [rows, columns]."""
        return by_group.repeat_interleave(self.group, 1)

    def nearest(self, wanted: torch.Tensor, column: int) -> torch.Tensor:
        group = column // self.group
        if self.form.zeros is not None:
            wanted = wanted.masked_fill(self.form.zeros[:, column], 0)
        return self.grid.codes(wanted, self.scale[:, group], self.zero[:, group])

    def given(self, codes: torch.Tensor, column: int) -> torch.Tensor:
        group = column // self.group
        return (codes - self.zero[:, group]) * self.scale[:, group]

    def with_codes(self, codes: torch.Tensor) -> Coded:
        return replace(self, codes=codes)

    def refitted(self, problem: Quadratic) -> Coded:
        if self.form.scales not in ("searched", "least") or not self.grid.free_scales:
            return self
        units = self.codes - self.spread(self.zero)
        if not self.shared:
            return replace(self, scale=best_scales(problem, units, self.scale))
        image = units @ problem.hessian
        fit = (image * problem.optimum).sum() / (image * units).sum().clamp(min=1e-300)
        return replace(self, scale=torch.where(fit > 0, fit, self.scale))

    def with_rows(self, other: Coded, rows: torch.Tensor) -> Coded:
        mask = rows[:, None]
        codes, scale = torch.where(mask, other.codes, self.codes), torch.where(mask, other.scale, self.scale)
        return replace(self, codes=codes, scale=scale)

    def write(self, to: Constants) -> Value:
        table, scale = self.grid.table, self.scale[:1, :1] if self.shared else self.scale
        if table is not None:
            digits, base = self.grid.digits(self.codes)
            matrix = to.build.codebook(to.digits(digits, base), to.buffer("levels", table[None]))
            return to.scaled(matrix, scale)
        if not to.packed or self.grid.few_bits is None:
            return self.laid_out(to, self.codes, 0)
        q = to.digits(*self.grid.digits(self.codes))
        if not self.grid.symmetric:
            return self._back(to, q, None, 0)
        return to.scaled(to.build.add(to.build.cast(q, dtype=torch.float32), float(self.grid.low)), scale)

    def laid_out(self, to: Constants, codes: torch.Tensor, outputs: int) -> Value:
        """The matrix, with its codes laid out in another shape, whose axis ``outputs`` has the rows."""
        return self._back(to, to.weight("quantized", codes.to(self.grid.dtype)), self.grid.few_bits, outputs)

    def _back(self, to: Constants, q: Value, bits: int | None, outputs: int) -> Value:
        if self.shared:
            scale, zero, where = self.scale[0, 0], self.zero[0, 0], {}
        elif self.scale.shape[1] == 1:
            scale, zero, where = self.scale[:, 0], self.zero[:, 0], {"axis": outputs}
        else:
            scale, zero = (part.t() if outputs else part for part in (self.scale, self.zero))
            where = {"axis": 1 - outputs, "block_size": self.group}
        s = to.weight("scale", scale.float())
        silent = self.grid.symmetric and (to.at_load or not to.zeros)
        z = None if silent else to.buffer("zero_point", zero.to(self.grid.dtype))
        few = {} if bits is None else {"bits": bits}
        name = f"{to.name}_dequantized"
        found: Value = to.build.dequantize(q, s, z, name=name, at_load=to.at_load, **where, **few)
        return found

    def coarser(self, factor: torch.Tensor) -> Coded:
        """The same numbers on scales that are ``factor`` [rows] times as large."""
        codes = torch.round((self.codes - self.spread(self.zero)) / factor[:, None]) + self.spread(self.zero)
        return replace(self, codes=codes, scale=self.scale * factor[:, None])


def _searched(grid: Grid, parts: torch.Tensor, weighs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each group the whole range and smaller ones are tried, which clip its extremes (Choukroun et al. 2019, Low-bit
    Quantization of Neural Networks for Efficient Inference)."""
    least = torch.full(parts.shape[:2], torch.inf, dtype=torch.float64)
    best_scale, best_zero = torch.ones_like(least), torch.zeros_like(least)
    for shrink in _SHRINKS:
        scale, zero = grid.span(parts.amin(2) * shrink, parts.amax(2) * shrink)
        codes = grid.codes(parts, scale[..., None], zero[..., None])
        error = (((codes - zero[..., None]) * scale[..., None] - parts).square() * weighs).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero
