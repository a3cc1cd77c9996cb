"""What :mod:`regauge.passes.factorization.nested_links` finds, where the metric of inputs has fewer rows than columns.

    A = Z'Z + r I      M = W_k + H Z_k      E Z' = r H      H = (W Z' - W_k Z_k')(Z_k Z_k' + r I)^-1

with W_k and Z_k the first k columns of the weight and of the rows. Of a band, whose metric is Z_b'Z_b + r_b I with some
of the rows of Z,

    M A_b M' = X_b X_b' + r_b M M'     E A_b M' = r H_b X_b' + r_b E M'     E A_b E' = r^2 H_b H_b' + r_b E E'

with X = M Z' = W Z' - r H. Nothing is as large as the metric itself: what grows from one first link to the next are
products of the rows with each other and with the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from regauge.passes.calibration.moments import factor_of
from regauge.passes.factorization.grams import Gram
from regauge.passes.factorization.nested_links import Behind, Images, Metrics


@dataclass(frozen=True)
class _Band:
    """Which rows are its own, its ridge r_b and metric of outputs."""

    own: slice
    ridge: float
    outputs: torch.Tensor | None


@dataclass(frozen=True)
class _Step:
    """One first link, with M Z' [outputs, rows], H [outputs, rows], M M' and -E M' [outputs, outputs]."""

    bands: Sequence[_Band]
    ridge: float
    image: torch.Tensor
    found: torch.Tensor
    square: torch.Tensor
    between: torch.Tensor

    def images(self) -> Images:
        pairs = []
        for band in self.bands:
            image = self.image[:, band.own]
            kept = image @ image.t() + band.ridge * self.square
            between = self.ridge * self.found[:, band.own] @ image.t() - band.ridge * self.between
            pairs.append((band.outputs, kept, between))
        return self.image @ self.image.t() + self.ridge * self.square, pairs


def links_behind_by_rows(
    weight: torch.Tensor, metric: Gram, bands: Sequence[Metrics], counts: Sequence[int]
) -> Iterator[Behind]:
    """As :func:`.nested_links.links_behind`; the rows of ``metric`` are those of the bands one after the other."""
    assert metric.rows is not None and isinstance(metric.ridge, float)
    rows, ridge, size = metric.rows.flatten(1), metric.ridge, len(weight)
    parts, seen = list(_parts(bands)), weight @ rows.t()
    gram, kept, square = rows.new_zeros(len(rows), len(rows)), torch.zeros_like(seen), rows.new_zeros(size, size)
    squares = [((weight if band.outputs is None else band.outputs @ weight) * weight).sum(0) for band in parts]
    for start, count in zip([0, *counts], counts, strict=False):
        own, columns = rows[:, start:count], weight[:, start:count]
        gram = gram + own @ own.t()
        kept = kept + columns @ own.t()
        square = square + columns @ columns.t()
        found = torch.cholesky_solve((seen - kept).t(), factor_of(gram, ridge)).t()
        lost, shared = found @ gram @ found.t(), found @ kept.t()
        least = rows.new_zeros(())
        for band, squared in zip(parts, squares, strict=True):
            off, outputs = found[:, band.own], band.outputs
            weighed, inside = (off, lost.diagonal()) if outputs is None else (outputs @ off, outputs * lost)
            least += ridge**2 * (weighed * off).sum() + band.ridge * (squared[count:].sum() + inside.sum())
        between = shared + lost
        step = _Step(parts, ridge, seen - ridge * found, found, square + shared.t() + between, between)
        yield Behind(count, least, step.images)


def _parts(bands: Sequence[Metrics]) -> Iterator[_Band]:
    start = 0
    for inputs, outputs in bands:
        assert inputs.rows is not None and isinstance(inputs.ridge, float)
        yield _Band(slice(start, start + len(inputs.rows)), inputs.ridge, outputs)
        start += len(inputs.rows)
