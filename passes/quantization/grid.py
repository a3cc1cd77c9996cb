"""Grids of integers, and matrices rounded to them: codes with a scale for each row, or for groups of its columns.

w ~ (code - zero) * scale        symmetric: no zero, codes -2^(b-1) ... 2^(b-1) - 1;  else codes 0 ... 2^b - 1
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

_SHRINKS = torch.linspace(1.0, 0.35, 27, dtype=torch.float64)  # shares of the range that are tried


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

    def span(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of ranges, which are widened to hold 0: it must stay 0."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            scale = torch.maximum(-low / -self.low, high / self.high)
            return _positive(scale), torch.zeros_like(scale)
        scale = _positive((high - low) / (self.high - self.low))
        return scale, torch.round(-low / scale).clamp(self.low, self.high)

    def codes(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest integers, halves to even, in the type of ``x``."""
        return (torch.round(x / scale) + zero).clamp(self.low, self.high)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """A scale of 1 where all entries are 0."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


@dataclass(frozen=True)
class Form:
    """How a matrix is stored: on a grid, with a scale for each ``group`` of neighbouring columns of a row."""

    grid: Grid
    group: int


@dataclass
class Coded:
    """A matrix [rows, columns] on a grid; ``scale`` and ``zero`` are [rows, groups] of neighbouring columns."""

    grid: Grid
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    @property
    def group(self) -> int:
        """Columns in a group."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def values(self) -> torch.Tensor:
        """[rows, columns]: the numbers that the codes stand for."""
        return (self.codes - self.spread(self.zero)) * self.spread(self.scale)

    def spread(self, by_group: torch.Tensor) -> torch.Tensor:
        """[rows, groups] as [rows, columns]."""
        return by_group.repeat_interleave(self.group, 1)

    def with_codes(self, codes: torch.Tensor) -> Coded:
        return replace(self, codes=codes)

    def with_scale(self, scale: torch.Tensor) -> Coded:
        return replace(self, scale=scale)

    def coarser(self, factor: torch.Tensor) -> Coded:
        """The same numbers on scales that are ``factor`` [rows] times as large."""
        codes = torch.round((self.codes - self.spread(self.zero)) / factor[:, None]) + self.spread(self.zero)
        return replace(self, codes=codes, scale=self.scale * factor[:, None])


def rounded(weight: torch.Tensor, grid: Grid, group: int, importance: torch.Tensor | None = None) -> Coded:
    """A matrix rounded to the nearest codes, with the scales that lose least.

    Of each group the whole range and smaller ones are tried, which clip its extremes (Choukroun et al. 2019, Low-bit
    Quantization of Neural Networks for Efficient Inference); the error of a column weighs its ``importance`` [columns].
    """
    rows, columns = weight.shape
    parts = weight.double().reshape(rows, columns // group, group)
    weighs = torch.ones(columns, dtype=torch.float64) if importance is None else importance.double()
    weighs = weighs.reshape(1, columns // group, group)
    least = torch.full(parts.shape[:2], torch.inf, dtype=torch.float64)
    best_scale, best_zero = torch.ones_like(least), torch.zeros_like(least)
    for shrink in _SHRINKS:
        scale, zero = grid.span(parts.amin(2) * shrink, parts.amax(2) * shrink)
        codes = grid.codes(parts, scale[..., None], zero[..., None])
        error = (((codes - zero[..., None]) * scale[..., None] - parts).square() * weighs).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    codes = grid.codes(parts, best_scale[..., None], best_zero[..., None]).reshape(rows, columns)
    return Coded(grid, codes, best_scale, best_zero)
