"""One factor of a layer fitted beside the others, in the metrics of a problem.

    least over f of  the error of a(f) in place of W        a is linear

Conjugate gradients lower this quadratic without its matrix: the transposed product with ``a`` comes from torch's
differentiation. They are preconditioned by the product of two metrics that comes near to it. A step never raises the
error, so few of them do no harm. In turns over factors it is alternating least squares (Kolda and Bader 2009, Tensor
Decompositions and Applications, section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from regauge.passes.calibration.moments import factor_of
from regauge.passes.factorization.problems import Problem

_STEPS = 5
_RIDGE = 1e-8


def bettered(
    problem: Problem,
    image: Callable[[torch.Tensor], torch.Tensor],
    factor: torch.Tensor,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
) -> torch.Tensor:
    """The factor [rows, columns] after some steps; ``image`` gives the matrix [outputs, columns] of one.

    ``left`` [rows, rows] and ``right`` [columns, columns] are the metrics that the error is nearly the product of.
    """

    def transposed(matrix: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            variable = torch.zeros_like(factor).requires_grad_(True)
            (found,) = torch.autograd.grad(image(variable), variable, matrix)
        return found

    before_left, before_right = _factor(left), _factor(right)

    def eased(residual: torch.Tensor) -> torch.Tensor:
        if before_left is not None:
            residual = torch.cholesky_solve(residual, before_left)
        return residual if before_right is None else torch.cholesky_solve(residual.t(), before_right).t()

    residual = transposed(problem.weighed(problem.weight - image(factor)))
    direction = eased(residual)
    energy = (residual * direction).sum()
    for _ in range(_STEPS):
        moved = transposed(problem.weighed(image(direction)))
        curvature = (direction * moved).sum()
        if not float(curvature) > 0:
            break
        length = energy / curvature
        factor = factor + length * direction
        residual = residual - length * moved
        step = eased(residual)
        before, energy = energy, (residual * step).sum()
        direction = step + energy / before * direction
    return factor


def _factor(metric: torch.Tensor | None) -> torch.Tensor | None:
    if metric is None:
        return None
    return factor_of(metric, max(_RIDGE * float(metric.diagonal().mean()), 1e-300))
