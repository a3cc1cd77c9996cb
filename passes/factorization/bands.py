"""How much errors of convolutions matter that are alike at all places, or change slowly, or fast.

    |J dy|^2  =  sum over frequencies w of  g_w' dW x_w x_w' dW' g_w     ~  sum over bands b of  tr( B_b dW A_b dW' )

with x_w the Fourier coefficients, over the places of an image, of what the kernel meets, and g_w those of the gradients
of the outputs; both are averaged on their own within a band of frequencies. With a single band it is the approximation
of Grosse and Martens 2016 (A Kronecker-factored approximate Fisher matrix for convolution layers), whose "spatially
uncorrelated derivatives" this drops: errors that are alike everywhere add up in the pools behind, others do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from regauge.ir.graph import Graph, Value
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.gradients import visit_gradients
from regauge.passes.calibration.layers import Layer
from regauge.passes.factorization.grams import Gram

EDGES = (1, 2, 4)  # cycles per image from which on a band is another: 0, 1, 2 and 3, more
_AT_ONCE = 1 << 24  # numbers that are transformed together

Bands = Sequence[tuple[Gram, torch.Tensor]]
"""Metrics of inputs and of outputs [outputs, outputs] of each band."""


@dataclass
class Spectrum:
    """For each band the sum of x_w x_w' over its frequencies [size, size], and how many of these were added.

    The last band is what slower waves leave of ``total``, the sum over all places: only these are looked for. Up to so
    many rows as ``most`` those of a band are kept as they are; where they are ``few`` the last band's, too.
    """

    size: int
    total: torch.Tensor
    most: int = 0
    few: bool = False
    rows: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    slow: dict[int, torch.Tensor] = field(default_factory=dict)
    counts: dict[int, float] = field(default_factory=dict)

    @property
    def sums(self) -> dict[int, torch.Tensor]:
        found = {band: _moments(own) for band, own in self.rows.items()} | self.slow
        if not self.few and self.counts.get(len(EDGES)):
            found[len(EDGES)] = self.total - sum(found.values())
        return dict(sorted(found.items()))

    def add(self, rows: torch.Tensor, places: Sequence[int]) -> None:
        """Add rows [examples x places, size], the places of an example in order; not to ``total``."""
        grid = rows.reshape(-1, *places, self.size)
        waves = [_waves(size, fast=self.few) for size in places]
        cycles = torch.stack(torch.meshgrid(*(own for _, own in waves), indexing="ij")).amax(0).flatten()
        bands = torch.bucketize(cycles, torch.tensor(EDGES), right=True)
        step = max(1, _AT_ONCE // max(1, grid[0].numel()))
        for start in range(0, len(grid), step):
            found = grid[start : start + step].float()
            count = len(found)
            for axis in reversed(range(len(places))):
                before = count * prod(places[:axis])
                found = waves[axis][0].to(found) @ found.reshape(before, places[axis], -1)
            found = found.reshape(count, len(bands), self.size)
            for band in range(len(EDGES) + self.few):
                own = found[:, bands == band].reshape(-1, self.size)
                if len(own):
                    self._add(band, own)
        fast = len(grid) * (prod(places) - len(bands))
        self.counts[len(EDGES)] = self.counts.get(len(EDGES), 0.0) + fast

    def _add(self, band: int, rows: torch.Tensor) -> None:
        self.counts[band] = self.counts.get(band, 0.0) + len(rows)
        if self.counts[band] <= self.most:
            self.rows.setdefault(band, []).append(rows.double())
            return
        total = self.slow.get(band, torch.zeros_like(self.total))
        self.slow[band] = total + _moments([*self.rows.pop(band, []), rows])

    def grams(self, share: float) -> dict[int, Gram]:
        """The metric of each band, with a ridge of a ``share`` of the mean square of a column."""
        kept = {band: torch.cat(own) for band, own in sorted(self.rows.items())}
        found = {band: Gram.of_rows(own, share * float(own.square().sum()) / self.size) for band, own in kept.items()}
        if any(count and band not in kept for band, count in self.counts.items()):
            for band, total in self.sums.items():
                if band not in kept:
                    found[band] = Gram.of(_ridged(total, share))
        return dict(sorted(found.items()))


def _moments(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    size = rows[0].shape[1]
    return sum(((own.t() @ own).double() for own in rows), start=_zeros(size))


def _waves(size: int, *, fast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal cosines and sines [waves, size] and their cycles: all, or only fewer than the last band has."""
    place, found = torch.arange(size, dtype=torch.float64) / size, list[tuple[torch.Tensor, int]]()
    every = size // 2 + 1
    for cycles in range(every if fast else min(EDGES[-1], every)):
        angle = 2 * torch.pi * cycles * place
        found.append((angle.cos(), cycles))
        if cycles and 2 * cycles != size:  # otherwise the sine is nothing
            found.append((angle.sin(), cycles))
    return torch.stack([wave / wave.norm() for wave, _ in found]), torch.tensor([cycles for _, cycles in found])


def output_bands(graph: Graph, layers: Iterable[Layer], batches: Sequence[Any], seed: int) -> Mapping[str, Spectrum]:
    """Of each convolution, by the name of its weight, the spectrum of what the graph's outputs move by with its own.

    The sums are means over examples, as :func:`regauge.passes.calibration.sensitivity.output_metrics` has them.
    """
    own = {layer.node.output: layer for layer in layers if _has_places(layer)}
    found = {layer.weight.name: Spectrum(layer.outputs, _zeros(layer.outputs)) for layer in own.values()}
    if not found:
        return found

    def visit(value: Value, _: torch.Tensor, gradient: torch.Tensor) -> None:
        layer = own[value]
        rows, spectrum = layer.rows_of_output(gradient), found[layer.weight.name]
        spectrum.add(rows, gradient.shape[2:])
        spectrum.total += (rows.float().t() @ rows.float()).double()

    visit_gradients(graph, batches, list(own), visit, seed=seed)
    examples = max(1, sum(examples_in(batch) for batch in batches))
    for spectrum in found.values():
        spectrum.total /= examples
        spectrum.slow = {band: total / examples for band, total in spectrum.slow.items()}
    return found


def _zeros(size: int) -> torch.Tensor:
    return torch.zeros(size, size, dtype=torch.float64)


def _has_places(layer: Layer) -> bool:
    return layer.node.op in ("conv", "conv_transpose") and layer.blocks == 1


def metrics_in_bands(inputs: Spectrum, outputs: Spectrum, share: float) -> Bands:
    """The metrics of each band; both get a ridge, of a ``share`` of the mean square of a column.

    Of few examples moments have no full rank, and rounded ones, or what is left of others, may have less than nothing
    there: an error that could be lowered without end.
    """
    given = outputs.sums
    found = [
        (metric, _ridged(given[band] / max(outputs.counts[band], 1.0), share))
        for band, metric in inputs.grams(share).items()
        if band in given
    ]
    return found if len(found) > 1 else []


def _ridged(metric: torch.Tensor, share: float) -> torch.Tensor:
    found = metric.clone()
    found.diagonal().add_(share * float(metric.diagonal().mean()))
    return found
