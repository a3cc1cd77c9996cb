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
from typing import Any

import torch

from regauge.ir.graph import Graph, Value
from regauge.passes.calibration.batches import examples_in
from regauge.passes.calibration.gradients import visit_gradients
from regauge.passes.calibration.layers import Layer

EDGES = (1, 2, 4)  # cycles per image from which on a band is another: 0, 1, 2 and 3, more
_AT_ONCE = 1 << 24  # numbers that are transformed together

Bands = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Metrics of inputs [columns, columns] and of outputs [outputs, outputs] of each band."""


@dataclass
class Spectrum:
    """For each band the sum of x_w x_w' over its frequencies [size, size], and how many of these were added."""

    size: int
    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    counts: dict[int, float] = field(default_factory=dict)

    def add(self, rows: torch.Tensor, places: Sequence[int]) -> None:
        """Add rows [examples x places, size], the places of an example in order."""
        grid = rows.reshape(-1, *places, rows.shape[-1])
        bands, twice = _bands_of(places)
        step = max(1, _AT_ONCE // max(1, grid[0].numel()))
        for start in range(0, len(grid), step):
            part = grid[start : start + step].float()
            axes = tuple(range(1, 1 + len(places)))
            found = torch.fft.rfftn(part, dim=axes, norm="ortho").flatten(1, len(places)) * twice.sqrt()[:, None]
            for band in sorted(set(bands.tolist())):
                own = found[:, bands == band].reshape(-1, self.size)
                both = torch.cat([own.real, own.imag])
                self.sums[band] = self.sums.get(band, torch.zeros((), dtype=torch.float64)) + (both.t() @ both).double()
                self.counts[band] = self.counts.get(band, 0.0) + len(part) * float(twice[bands == band].sum())


def _bands_of(places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The band of each frequency of a real transform, and how often it stands for one: its mirror image is left out."""
    last = len(places) - 1
    axes = []
    for axis, size in enumerate(places):
        cycles = torch.fft.rfftfreq(size) if axis == last else torch.fft.fftfreq(size)
        axes.append((cycles * size).abs().round().long())
    grids = torch.meshgrid(*axes, indexing="ij")
    radius = torch.stack(grids).amax(0).flatten()
    alone = (grids[last] == 0) | (2 * grids[last] == places[last])
    return torch.bucketize(radius, torch.tensor(EDGES), right=True), torch.where(alone, 1.0, 2.0).flatten()


def output_bands(graph: Graph, layers: Iterable[Layer], batches: Sequence[Any], seed: int) -> Mapping[str, Spectrum]:
    """Of each convolution, by the name of its weight, the spectrum of what the graph's outputs move by with its own.

    The sums are means over examples, as :func:`regauge.passes.calibration.sensitivity.output_metrics` has them.
    """
    own = {layer.node.output: layer for layer in layers if _has_places(layer)}
    found = {layer.weight.name: Spectrum(layer.outputs) for layer in own.values()}
    if not found:
        return found

    def visit(value: Value, _: torch.Tensor, gradient: torch.Tensor) -> None:
        layer = own[value]
        found[layer.weight.name].add(layer.rows_of_output(gradient), gradient.shape[2:])

    visit_gradients(graph, batches, list(own), visit, seed=seed)
    examples = max(1, sum(examples_in(batch) for batch in batches))
    for spectrum in found.values():
        spectrum.sums = {band: total / examples for band, total in spectrum.sums.items()}
    return found


def _has_places(layer: Layer) -> bool:
    return layer.node.op in ("conv", "conv_transpose") and layer.blocks == 1


def metrics_in_bands(inputs: Spectrum, outputs: Spectrum, share: float) -> Bands:
    """The metrics of each band; those of inputs get a ridge of a ``share`` of the mean square of a column."""
    found = []
    for band, total in inputs.sums.items():
        if band in outputs.sums:
            ridge = share * float(total.diagonal().mean())
            metric = total + ridge * torch.eye(inputs.size, dtype=total.dtype)
            found.append((metric, outputs.sums[band] / max(outputs.counts[band], 1.0)))
    return found if len(found) > 1 else []
