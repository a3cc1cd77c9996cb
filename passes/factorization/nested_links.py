"""What is lost behind each of many first links at once, where each has the directions of those before it and more.

    E = W - M F     F: the first c rows of an orthogonal matrix, M: the best behind them in a metric A

In the basis of that matrix the Cholesky factor A = L L' holds all of them: of Y = W L the first c columns are what is
kept, the others what is lost, as L is lower triangular. In another metric A_b, that of a band, with N = L^-1 A_b L^-T

    M A_b M' = Y1 N11 Y1'     E A_b M' = Y2 N21 Y1'     E A_b E' = Y2 N22 Y2'

grow by blocks of columns from one first link to the next, so that all of them cost little more than the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TypeAlias

import torch

from regauge.passes.calibration.moments import factor_of
from regauge.passes.factorization.grams import Gram
from regauge.passes.factorization.metric_svd import principal, unscaled

Metrics: TypeAlias = tuple[Gram, torch.Tensor | None]
"""Of inputs and of outputs [outputs, outputs]; none is the plain one."""
Images: TypeAlias = tuple[torch.Tensor, Sequence[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]]
"""M A M' [outputs, outputs]; and of each band the metric of outputs, M A_b M' and E A_b M'."""

_ROUNDING = 1e-9  # of a product with a metric, up to which bands add up to it


@dataclass(frozen=True)
class Behind:
    """The best M behind one first link of ``columns`` columns: ``least`` is the error."""

    columns: int
    least: torch.Tensor
    images: Callable[[], Images]

    def lost(self, outputs: torch.Tensor | None) -> torch.Tensor:
        """The error with each number of directions of M, from none to all of them, the most important ones first in
        the metric of ``outputs``.

        Those that are left out are products of two vectors each: how any two of them count together, and with what all
        leave over, is found once for all numbers.
        """
        root = None if outputs is None else factor_of(outputs, 0.0)
        image, bands = self.images()
        values, vectors = principal(image if root is None else root.t() @ image @ root)
        vectors = vectors[:, : min(len(values), self.columns)]
        up, down = unscaled(vectors, root), vectors.t() if root is None else vectors.t() @ root.t()
        beside = torch.zeros(len(down), dtype=down.dtype)
        together = torch.zeros(len(down), len(down), dtype=down.dtype)
        for metric, kept, between in bands:
            left = up if metric is None else metric @ up
            beside += ((left.t() @ between) * down).sum(1)
            together += (up.t() @ left) * (down @ kept @ down.t())
        pairs = together.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        return torch.cat([self.least + 2 * beside.flip(0).cumsum(0).flip(0) + pairs, self.least[None]])


def links_behind(
    weight: torch.Tensor, inputs: Gram, bands: Sequence[Metrics], basis: torch.Tensor, counts: Sequence[int]
) -> Iterator[Behind]:
    """Behind each first link, which have the first of the columns of ``weight`` [outputs, columns], ascending
    ``counts`` of them. M is the best in the metric ``inputs``; errors are told by ``bands``. Metrics are turned to the
    ``basis`` of the weight first. In double precision."""
    lower = factor_of(inputs.turned(basis).matrix(), 0.0)
    image = weight @ lower
    bounds = [0, *counts, weight.shape[1]]
    found = _in_bands(image, lower, inputs, bands, basis, bounds)
    plain = torch.zeros(len(weight), len(weight), dtype=weight.dtype)
    for place, count in enumerate(counts):
        own = image[:, bounds[place] : count]
        plain = plain + own @ own.t()
        for band in found:
            band.step(place)
        pairs = [(band.outputs, band.kept, band.whole - band.kept) for band in found]
        least = torch.stack([band.least[place] for band in found]).sum()
        yield Behind(count, least, partial(_same, (plain, pairs)))


def _same(images: Images) -> Images:
    return images


def _in_bands(
    image: torch.Tensor,
    lower: torch.Tensor,
    inputs: Gram,
    bands: Sequence[Metrics],
    basis: torch.Tensor,
    bounds: Sequence[int],
) -> list[_Band]:
    """With N = L^-1 A_b L^-T; what follows from the others is not computed: the largest, where all add up to A."""
    if len(bands) == 1 and bands[0][0] is inputs:
        return [_Band(image, None, bands[0][1], bounds)]
    last = max(range(len(bands)), key=lambda band: _count(bands[band][0]))
    more = _sum_off(inputs, [metric for metric, _ in bands])
    inverse = torch.zeros(0)  # L^-1 L^-T, where it is needed
    if more is not None or any(metric.rows is not None for metric, _ in bands):
        inverse = torch.cholesky_inverse(lower.t().flip(0, 1)).flip(0, 1)
    found, total = dict[int, _Band](), torch.zeros(0)
    for band in sorted(range(len(bands)), key=lambda band: band == last):
        metric, outputs = bands[band]
        if more is not None and band == last:
            own = more * inverse - total
            own.diagonal().add_(1)
        else:
            own = _whitened(metric.turned(basis), lower, inverse)
        if more is not None and band != last:
            total = total + own if total.numel() else own
        found[band] = _Band(image, own, outputs, bounds)
    return [found[band] for band in range(len(bands))]


def _whitened(metric: Gram, lower: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """L^-1 A_b L^-T"""
    found: torch.Tensor
    if metric.rows is not None:
        assert isinstance(metric.ridge, float)
        half = torch.linalg.solve_triangular(lower, metric.rows.flatten(1).t(), upper=False)
        return torch.addmm(inverse, half, half.t(), beta=metric.ridge)
    half = torch.linalg.solve_triangular(lower, metric.matrix(), upper=False)
    found = torch.linalg.solve_triangular(lower, half.t(), upper=False)
    return found


def _count(metric: Gram) -> int:
    """Of the rows that products with it take."""
    return len(metric.rows) if metric.rows is not None else prod(metric.shape)


def _sum_off(inputs: Gram, bands: Sequence[Gram]) -> float | None:
    """How many of the identity the bands have in all beside ``inputs``; nothing where that is not what they differ in.

    By products with a random vector (Freivalds 1977), with which anything else shows.
    """
    probe = torch.randn(2, *inputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = inputs.weighed(probe)
    off = sum((own.weighed(probe) for own in bands), start=-whole)
    more = float((off * probe).sum() / probe.square().sum())
    return more if float((off - more * probe).norm()) <= _ROUNDING * float(whole.norm()) else None


class _Band:
    """Sums over the blocks of columns so far: ``kept`` is Y1 N11 Y1', ``whole`` Y N1 Y1'.

    ``least`` is, of each block, the error once it and those before it are kept. N is the identity where it is None.
    """

    def __init__(
        self, image: torch.Tensor, metric: torch.Tensor | None, outputs: torch.Tensor | None, bounds: Sequence[int]
    ) -> None:
        self.outputs, self.bounds, self.image = outputs, bounds, image
        self.kept = self.whole = torch.zeros(len(image), len(image), dtype=image.dtype)
        self._before, self._inside, behind = torch.zeros_like(image), image, torch.zeros_like(image)
        if metric is not None:
            self._inside = torch.zeros_like(image)
            for a, b in zip(bounds, bounds[1:], strict=False):
                self._before[:, a:b] = image[:, :a] @ metric[:a, a:b]
                self._inside[:, a:b] = image[:, a:b] @ metric[a:b, a:b]
                behind[:, a:b] = image[:, b:] @ metric[b:, a:b]
        self._all = self._before + self._inside + behind
        left = image if outputs is None else outputs @ image
        each = (left * (self._inside + 2 * behind)).sum(0)
        self.least = [each[end:].sum() for end in bounds[1:-1]]

    def step(self, place: int) -> None:
        a, b = self.bounds[place : place + 2]
        own = self.image[:, a:b].t()
        before = self._before[:, a:b] @ own
        self.kept = self.kept + before + before.t() + self._inside[:, a:b] @ own
        self.whole = self.whole + self._all[:, a:b] @ own
