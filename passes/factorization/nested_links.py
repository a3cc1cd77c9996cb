"""What is lost behind each of many first links at once, where each has the directions of those before it and more.

    E = W - M F     F: the first c rows of an orthogonal matrix, M: the best behind them in a metric A

In the basis of that matrix the Cholesky factor A = L L' holds all of them: of Y = W L the first c columns are what is
kept, the others what is lost, as L is lower triangular. In another metric A_b, that of a band, with N = L^-1 A_b L^-T

    M A_b M' = Y1 N11 Y1'     E A_b M' = Y2 N21 Y1'     E A_b E' = Y2 N22 Y2'

grow by blocks of columns from one first link to the next, so that all of them cost little more than the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from regauge.passes.calibration.moments import factor_of
from regauge.passes.factorization.metric_svd import principal, unscaled

Metrics: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None]
"""Of inputs [columns, columns] and of outputs [outputs, outputs]; none is the plain one."""


@dataclass(frozen=True)
class Behind:
    """The best M behind one first link of ``columns`` columns: ``image`` is M A M' [outputs, outputs].

    Of each band there are the metric of outputs, M A_b M' and E A_b M'; ``least`` is the error.
    """

    columns: int
    image: torch.Tensor
    bands: Sequence[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]
    least: torch.Tensor

    def lost(self, outputs: torch.Tensor | None) -> torch.Tensor:
        """The error with each number of directions of M, from none to all of them, the most important ones first in
        the metric of ``outputs``.

        Those that are left out are products of two vectors each: how any two of them count together, and with what all
        leave over, is found once for all numbers.
        """
        root = None if outputs is None else factor_of(outputs, 0.0)
        values, vectors = principal(self.image if root is None else root.t() @ self.image @ root)
        vectors = vectors[:, : min(len(values), self.columns)]
        up, down = unscaled(vectors, root), vectors.t() if root is None else vectors.t() @ root.t()
        beside = torch.zeros(len(down), dtype=down.dtype)
        together = torch.zeros(len(down), len(down), dtype=down.dtype)
        for metric, kept, between in self.bands:
            left = up if metric is None else metric @ up
            beside += ((left.t() @ between) * down).sum(1)
            together += (up.t() @ left) * (down @ kept @ down.t())
        pairs = together.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        return torch.cat([self.least + 2 * beside.flip(0).cumsum(0).flip(0) + pairs, self.least[None]])


def links_behind(
    weight: torch.Tensor, inputs: torch.Tensor | None, bands: Sequence[Metrics], counts: Sequence[int]
) -> Iterator[Behind]:
    """Behind each first link, which have the first of the columns of ``weight`` [outputs, columns], ascending
    ``counts`` of them. M is the best in the metric ``inputs``; errors are told by ``bands``. In double precision."""
    lower = None if inputs is None else factor_of(inputs, 0.0)
    image = weight if lower is None else weight @ lower
    bounds = [0, *counts, weight.shape[1]]
    found = [_Band(image, _whitened(metric, inputs, lower), outputs, bounds) for metric, outputs in bands]
    plain = torch.zeros(len(weight), len(weight), dtype=weight.dtype)
    for place, count in enumerate(counts):
        own = image[:, bounds[place] : count]
        plain = plain + own @ own.t()
        for band in found:
            band.step(place)
        pairs = [(band.outputs, band.kept, band.whole - band.kept) for band in found]
        yield Behind(count, plain, pairs, torch.stack([band.least[place] for band in found]).sum())


def _whitened(
    metric: torch.Tensor | None, inputs: torch.Tensor | None, lower: torch.Tensor | None
) -> torch.Tensor | None:
    """L^-1 A_b L^-T; nothing where it is the identity."""
    if metric is inputs or metric is None or lower is None:
        return None if metric is inputs else metric
    half = torch.linalg.solve_triangular(lower, metric, upper=False)
    found: torch.Tensor = torch.linalg.solve_triangular(lower, half.t(), upper=False)
    return found


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
