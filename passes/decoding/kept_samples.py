"""What data shows of the values that a cache keeps: entries and gradients of a number of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from regauge.ir.graph import Graph, Value
from regauge.passes.calibration.gradients import visit_gradients
from regauge.passes.decoding.quantized_cache import Channels, balanced

MOST_ENTRIES = 1 << 23  # of a value: 32 MB, and as much for gradients


@dataclass(frozen=True)
class Sample:
    """A value on whole sequences, and gradients of the outputs for it, both [the value's axes].

    ``axes`` are the axes of fixed size before the last (heads), ``channels`` how to centre and balance channels.
    """

    tensor: torch.Tensor
    gradient: torch.Tensor
    axes: tuple[int, ...]

    def rows(self, part: torch.Tensor, most: int) -> torch.Tensor:
        """One of both as [fixed axes, at most so many positions of all sequences, channels]."""
        others = [axis for axis in range(part.dim() - 1) if axis not in self.axes]
        found = part.permute(*self.axes, *others, part.dim() - 1).flatten(len(self.axes), -2)
        count = found.shape[-2]
        if count <= most:
            return found
        places = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most]
        return found.index_select(-2, places)

    def channels(self) -> Channels:
        """Statistics over everything but the fixed axes."""
        axes = [axis for axis in range(self.tensor.dim() - 1) if axis not in self.axes]
        x, gradient = self.tensor.double(), self.gradient.double()
        deviation = x.var(axes, keepdim=True, unbiased=False).sqrt()
        return balanced(x.mean(axes, keepdim=True), deviation, gradient.square().mean(axes, keepdim=True).sqrt())

    def lost(self, left: torch.Tensor) -> float:
        """By how much the squared distance of the outputs grows for a sequence where ``left`` is left of the value."""
        change = (left.double() - self.tensor.double()) * self.gradient.double()
        return float(change.square().sum()) / self.tensor.shape[0]


def sample_kept(graph: Graph, values: Sequence[Value], batches: Sequence[object], seed: int) -> dict[str, Sample]:
    """A sample of each of the values that gradients reach, by name: the first sequences of the batches."""
    found: dict[Value, list[tuple[torch.Tensor, torch.Tensor]]] = {value: [] for value in values}

    def visit(value: Value, tensor: torch.Tensor, gradient: torch.Tensor) -> None:
        taken, each = sum(len(x) for x, _ in found[value]), prod(tensor.shape[1:])
        room = max(0 if taken else 1, MOST_ENTRIES // max(1, each) - taken)
        if room and all(x.shape[1:] == tensor.shape[1:] for x, _ in found[value]):
            found[value].append((tensor[:room].clone(), gradient[:room].clone()))

    visit_gradients(graph, batches, values, visit, seed=seed)
    samples = {}
    for value, parts in found.items():
        if parts:
            axes = tuple(axis for axis, size in enumerate(value.shape[:-1]) if isinstance(size, int))
            tensor, gradient = (torch.cat(own) for own in zip(*parts, strict=True))
            samples[value.name] = Sample(tensor, gradient, axes)
    return samples
