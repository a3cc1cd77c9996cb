"""Ranges of activations: a histogram that is gathered batch by batch, and the ends that a grid should have.

minmax       the least and the greatest entry
percentile   without the entries beyond, of 10,000 one at each end
mse          the ends at which the squared error of rounding, clipping included, is least: that of what layers make of
             the value, to which channels contribute by the size of their weights
entropy      the ends at which the distribution changes least by Kullback-Leibler divergence (Migacz 2017, 8-bit
             Inference with TensorRT)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch

from regauge.passes.calibration.statistics import Collector
from regauge.passes.quantization.grid import Grid

Calibration: TypeAlias = Literal["minmax", "percentile", "mse", "entropy"]
Ends: TypeAlias = tuple[float, float]

_BINS = 4096  # of the whole histogram, an even number: zero lies between two of them
_OUTSIDE = 1e-4  # share of the entries beyond each end
_SHARES = torch.linspace(0.3, 1.0, 71, dtype=torch.float64)


class Histogram(Collector):
    """How often entries of a value fall into each of 4096 bins around zero; holds as many numbers, whatever the data.

    The bins reach as far as the greatest entry of the first batch. Where one lies further out, they are merged in pairs
    until they reach it. Entries count by the ``importance`` of their index on an ``axis``, where there is one, and as
    no further than ``depth`` below the greatest of their batch, where that is given.
    """

    def __init__(
        self, axis: int | None = None, importance: torch.Tensor | None = None, depth: float | None = None
    ) -> None:
        super().__init__(axis)
        self.importance, self.depth = importance, depth

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.depth is None or not x.numel() else x.clamp(min=float(x.max()) - self.depth)

    def add(self, x: torch.Tensor) -> None:
        entries = x.detach().reshape(-1).float()
        if not len(entries):
            return
        weighs = None
        if self.importance is not None and self.axis is not None:
            shape = [-1 if axis == self.axis % x.dim() else 1 for axis in range(x.dim())]
            weighs = self.importance.float().reshape(shape).expand(x.shape).reshape(-1)
        low, high = entries.min().double(), entries.max().double()
        self.state["lowest"] = torch.minimum(self.state.get("lowest", low), low)
        self.state["highest"] = torch.maximum(self.state.get("highest", high), high)
        reach = float(torch.maximum(-low, high))
        limit = float(self.state["limit"]) if "limit" in self.state else 0.0
        counts = self.state.get("counts", torch.zeros(_BINS, dtype=torch.float64))
        if not float(counts.sum()):
            limit = reach if reach > 0 else 1.0
        while limit < reach:
            limit, counts = 2 * limit, _merged(counts)
        self.state["limit"] = torch.tensor(limit, dtype=torch.float64)
        found = torch.histogram(entries, _BINS, range=(-limit, limit), weight=weighs).hist
        self.state["counts"] = counts + found.double()

    @property
    def range(self) -> Ends:
        return float(self.state["lowest"]), float(self.state["highest"])

    @property
    def centres(self) -> torch.Tensor:
        limit = float(self.state["limit"])
        return (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (2 * limit / _BINS) - limit

    @property
    def counts(self) -> torch.Tensor:
        return self.state["counts"]


def _merged(counts: torch.Tensor) -> torch.Tensor:
    """The same entries in bins of twice the width: half as many around the middle, none outside."""
    quarter = _BINS // 4
    result = torch.zeros_like(counts)
    result[quarter:-quarter] = counts.reshape(-1, 2).sum(1)
    return result


def ends_of(histogram: Histogram, grid: Grid, calibration: Calibration) -> Ends:
    """The ends of the range that a grid should cover."""
    return _ESTIMATES[calibration](histogram, grid)


def _minmax(histogram: Histogram, grid: Grid) -> Ends:
    return histogram.range


def _percentile(histogram: Histogram, grid: Grid) -> Ends:
    below = histogram.counts.cumsum(0) / histogram.counts.sum()
    width = float(histogram.centres[1] - histogram.centres[0]) / 2
    low = float(histogram.centres[int((below > _OUTSIDE).double().argmax())]) - width
    high = float(histogram.centres[int((below >= 1 - _OUTSIDE).double().argmax())]) + width
    return max(low, histogram.range[0]), min(high, histogram.range[1])


def _mse(histogram: Histogram, grid: Grid) -> Ends:
    """Of both ends drawn in by the same share, then of each alone."""
    low, high = histogram.range
    filled = histogram.counts > 0
    centres, counts = histogram.centres[filled], histogram.counts[filled]

    def losses(lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
        scale, zero = grid.span(lows[:, None], highs[:, None])
        given = (grid.codes(centres, scale, zero) - zero) * scale
        return ((given - centres).square() * counts).sum(1)

    share = _SHARES[losses(low * _SHARES, high * _SHARES).argmin()]
    lows = torch.cat([low * share * _SHARES, low * _SHARES])
    low = float(lows[losses(lows, (high * share).expand(len(lows))).argmin()])
    highs = torch.cat([high * share * _SHARES, high * _SHARES])
    high = float(highs[losses(torch.tensor(low, dtype=torch.float64).expand(len(highs)), highs).argmin()])
    return low, high


def _entropy(histogram: Histogram, grid: Grid) -> Ends:
    """Of shares of the range: entries outside are counted at its ends, those inside spread over each step evenly."""
    low, high = histogram.range
    centres, counts = histogram.centres, histogram.counts
    best, least = (low, high), float("inf")
    for share in _SHARES.tolist():
        inside = (centres >= low * share) & (centres <= high * share)
        part = counts[inside].clone()
        if not float(part.sum()):
            continue
        part[0] += counts[centres < low * share].sum()
        part[-1] += counts[centres > high * share].sum()
        scale, zero = grid.span(torch.tensor(low * share), torch.tensor(high * share))
        steps = (grid.codes(centres[inside], scale, zero) - grid.low).long()
        filled = counts[inside] > 0
        sums = torch.zeros(grid.high - grid.low + 1, dtype=torch.float64).index_add_(0, steps, counts[inside])
        bins = torch.zeros_like(sums).index_add_(0, steps, filled.double())
        spread = torch.where(filled, (sums / bins.clamp(min=1))[steps], 0.0)
        divergence = _divergence(part, spread)
        if divergence < least:
            best, least = (low * share, high * share), divergence
    return best


def _divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Kullback-Leibler divergence of two histograms; what q lacks counts as one part in a million."""
    p, q = p / p.sum(), q / q.sum().clamp(min=1e-300)
    filled = p > 0
    return float((p[filled] * (p[filled] / q[filled].clamp(min=1e-6)).log()).sum())


_ESTIMATES: Mapping[Calibration, Callable[[Histogram, Grid], Ends]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
