"""Factors of any form that is linear in each of them, fitted in the metrics of a problem.

    least over f_1, ..., f_k of  tr( B (W - a(f_1, ..., f_k)) A (W - a(f_1, ..., f_k))' )

by least squares in one factor after the other (alternating least squares; Kolda and Bader 2009, Tensor Decompositions
and Applications, section 3.4). Each step is a quadratic in one factor, which conjugate gradients lower without ever
forming its matrix: ``a`` with the factor exchanged is its product with a direction, the transposed product comes from
torch's differentiation. A step never raises the error, so few of them do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from regauge.passes.factorization.problems import Problem

Assemble: TypeAlias = Callable[..., torch.Tensor]
"""``assemble(*factors)``: the matrix [outputs, columns] of a layer, linear in each factor."""

_SWEEPS, _STEPS = 12, 12
_GAIN = 1e-3  # of the error in a sweep, below which no other is made


def fitted(
    problem: Problem, assemble: Assemble, start: Sequence[torch.Tensor], sweeps: int = _SWEEPS, steps: int = _STEPS
) -> list[torch.Tensor]:
    """The factors, from where they start."""
    factors = [factor.double() for factor in start]
    least = problem.error(assemble(*factors))
    for _ in range(sweeps):
        for place in range(len(factors)):
            factors[place] = bettered(problem, assemble, factors, place, steps)
        error = problem.error(assemble(*factors))
        if least - error <= _GAIN * least:
            break
        least = error
    return factors


def bettered(
    problem: Problem, assemble: Assemble, factors: Sequence[torch.Tensor], place: int, steps: int = _STEPS
) -> torch.Tensor:
    """One factor after some conjugate gradient steps beside the others."""

    def image(direction: torch.Tensor) -> torch.Tensor:
        return assemble(*factors[:place], direction, *factors[place + 1 :])

    def transposed(matrix: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            variable = torch.zeros_like(factors[place]).requires_grad_(True)
            (found,) = torch.autograd.grad(image(variable), variable, matrix)
        return found

    factor = factors[place]
    residual = transposed(problem.weighed(problem.weight - image(factor)))
    direction, energy = residual, residual.square().sum()
    for _ in range(steps):
        moved = transposed(problem.weighed(image(direction)))
        curvature = (direction * moved).sum()
        if not float(curvature) > 0:
            break
        length = energy / curvature
        factor = factor + length * direction
        residual = residual - length * moved
        before, energy = energy, residual.square().sum()
        direction = residual + energy / before * direction
    return factor
