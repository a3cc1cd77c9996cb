"""The weights of removed blocks, added to those of their neighbours with learned coefficients.

FuseGPT (Pei et al. 2024, arXiv 2411.14507): W' = W + (A B) * R elementwise, R the removed block's weight of the same
role, A [outputs, rank] and B [rank, columns] learned so that a group of blocks gives what the original group gives;
biases and gains have a coefficient each. B begins at zero: at first W' = W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from regauge.ir.edit import remove_dead
from regauge.ir.graph import Graph, Value
from regauge.ir.graph_copy import copy_graph
from regauge.passes.calibration.weight_gradients import Differentiable

_LEAST_SIZE = 1e-3  # of a weight of zeros


@dataclass
class Share:
    """What a weight takes of one removed weight: C * R."""

    removed: torch.Tensor
    factors: tuple[torch.Tensor, ...]  # A and B; of vectors the coefficients themselves

    @classmethod
    def none(cls, removed: torch.Tensor, rank: int, generator: torch.Generator) -> Share:
        """Nothing of it, and free to grow."""
        if removed.dim() < 2:
            return cls(removed, (torch.zeros_like(removed).requires_grad_(),))
        left = torch.randn(len(removed), rank, generator=generator).to(removed) / rank**0.5
        right = removed.new_zeros(rank, removed[0].numel())
        return cls(removed, (left.requires_grad_(), right.requires_grad_()))

    def taken(self) -> torch.Tensor:
        first, *rest = self.factors
        coefficients = first @ rest[0] if rest else first
        return coefficients.reshape(self.removed.shape) * self.removed


@dataclass
class Fused:
    """A weight with what it takes of the weights of removed blocks."""

    size = 1.0  # of what is learned, which begins at zero

    weight: torch.Tensor
    shares: list[Share]

    def tensor(self) -> torch.Tensor:
        return torch.stack([self.weight, *(share.taken() for share in self.shares)]).sum(0)

    @property
    def factors(self) -> Sequence[torch.Tensor]:
        return [factor for share in self.shares for factor in share.factors]


@dataclass
class Free:
    """A weight that is learned itself; where it is ``kept`` zero it has no gradient.

    Steps are shares of its root mean square (Shazeer and Stern 2018, Adafactor, section 8), as factors and weights
    beside norms have very different sizes.
    """

    factors: tuple[torch.Tensor]
    kept: torch.Tensor | None = None

    @property
    def size(self) -> float:
        return max(_LEAST_SIZE, float(self.factors[0].detach().square().mean().sqrt()))

    @classmethod
    def of(cls, weight: torch.Tensor, zeros_stay: bool) -> Free:
        return cls((weight.clone().requires_grad_(),), (weight != 0).to(weight.dtype) if zeros_stay else None)

    def tensor(self) -> torch.Tensor:
        (weight,) = self.factors
        return weight if self.kept is None else weight * self.kept


class Learned(Protocol):
    """What stands for a weight while it is learned."""

    @property
    def factors(self) -> Sequence[torch.Tensor]:
        """What gradients change."""

    @property
    def size(self) -> float:
        """By what the rate of learning is multiplied."""

    def tensor(self) -> torch.Tensor:
        """The weight."""


Weights: TypeAlias = Mapping[str, Learned]  # by the name of the parameter


def ending_in(graph: Graph, ends: Sequence[Value]) -> Graph:
    """A copy of a graph as far as some values, which are its outputs."""
    moved: dict[Value, Value] = {}
    result = copy_graph(graph, moved)
    result.outputs = [moved[end] for end in ends]
    remove_dead(result)
    return result


class Distillation:
    """What the outputs of one graph lack of another's, on batches, and weights that make it less.

    ``shares`` are what each output counts, the mean of all if not given. The teacher runs on a batch when the student
    does: nothing is held of other batches.
    """

    def __init__(self, teacher: Graph, student: Graph, weights: Weights, shares: Sequence[float] | None = None) -> None:
        self.teacher, self.weights = teacher, weights
        count = len(student.outputs)
        self._shares = torch.tensor([1 / count] * count if shares is None else shares)
        self._network = Differentiable(student, [])

    def errors(self, batch: Any) -> torch.Tensor:
        """The squared error of each output as a share of its squares."""
        wanted = self.teacher.run(batch)
        found = self._network.run(batch, {name: own.tensor() for name, own in self.weights.items()})
        errors = [
            (y - z).square().sum() / y.square().sum().clamp(min=1e-30) for y, z in zip(wanted, found, strict=True)
        ]
        return torch.stack(errors)

    def error(self, batch: Any) -> torch.Tensor:
        """What training makes less: the errors of all outputs, each by what it counts."""
        errors = self.errors(batch)
        return (errors * self._shares.to(errors)).sum()

    def train(self, batches: Sequence[Any], steps: int, rate: float) -> None:
        """Adam with a rate that falls to zero along a cosine; each step sees one batch, in turn."""
        adam = torch.optim.Adam([{"params": own.factors, "lr": rate * own.size} for own in self.weights.values()])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
        for step in range(steps):
            with torch.enable_grad():
                adam.zero_grad()
                self.error(batches[step % len(batches)]).backward()  # type: ignore[no-untyped-call]
            adam.step()
            schedule.step()
