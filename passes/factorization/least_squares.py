"""One factor of a layer fitted beside the others, in the metrics of a problem.

    least over f of  the error of a(f) in place of W        a is linear

Conjugate gradients lower this quadratic without its matrix: the transposed product with ``a`` comes from torch's
differentiation. They may be preconditioned, as by the product of two metrics that comes near to it. A step never raises
the error, so few of them do no harm. In turns over factors it is alternating least squares (Kolda and Bader 2009,
Tensor Decompositions and Applications, section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from regauge.passes.calibration.moments import factor_of
from regauge.passes.factorization.problems import Problem

_STEPS = 5
_RIDGE = 1e-9  # of the mean of a metric

Divided = Callable[[torch.Tensor], torch.Tensor]
"""Divides a gradient of a factor by a positive definite guess at the curvature, with which steps go further."""


def bettered(
    problem: Problem,
    image: Callable[[torch.Tensor], torch.Tensor],
    factor: torch.Tensor,
    divided: Divided = lambda gradient: gradient,
    steps: int = _STEPS,
) -> torch.Tensor:
    """The factor after some steps; ``image`` gives the matrix [outputs, columns] of one, and is linear."""

    def transposed(matrix: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            variable = torch.zeros_like(factor).requires_grad_(True)
            (found,) = torch.autograd.grad(image(variable), variable, matrix)
        return found

    def curved(change: torch.Tensor) -> torch.Tensor:
        return transposed(problem.weighed(image(change)))

    residual = transposed(problem.weighed(problem.weight - image(factor)))
    return lowered(factor, residual, curved, divided, steps)[0]


def lowered(
    factor: torch.Tensor,
    residual: torch.Tensor,
    curved: Callable[[torch.Tensor], torch.Tensor],
    divided: Divided = lambda gradient: gradient,
    steps: int = _STEPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A factor after some steps of conjugate gradients, and what they leave of ``residual``, half of the gradient
    downhill. ``curved`` is the product of the quadratic's matrix and a factor."""
    direction = divided(residual)
    energy = (residual * direction).sum()
    for _ in range(steps):
        moved = curved(direction)
        curvature = (direction * moved).sum()
        if not float(curvature) > 0:
            break
        length = energy / curvature
        factor = factor + length * direction
        residual = residual - length * moved
        downhill = divided(residual)
        before, energy = energy, (residual * downhill).sum()
        direction = downhill + energy / before * direction
    return factor, residual


def divided_by(left: torch.Tensor | None, right: torch.Tensor | None) -> Divided:
    """Where the curvature is nearly the product of two metrics of a factor [..., rows, columns].

    They are ``left`` [..., rows, rows] and ``right`` [..., columns, columns]; none is the plain one.
    """
    return divided_by_roots(*(None if metric is None else root_of(metric) for metric in (left, right)))


def divided_by_roots(before: torch.Tensor | None, behind: torch.Tensor | None) -> Divided:
    """The same by what :func:`root_of` finds of the two metrics."""

    def divided(gradient: torch.Tensor) -> torch.Tensor:
        if before is not None:
            gradient = torch.cholesky_solve(gradient, before)
        return gradient if behind is None else torch.cholesky_solve(gradient.mT, behind).mT

    return divided


def root_of(metric: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor of a metric, or of each of several."""
    if metric.dim() > 2:
        return torch.stack([root_of(own) for own in metric])
    return factor_of(metric, max(_RIDGE * float(metric.diagonal().mean()), 1e-300))
