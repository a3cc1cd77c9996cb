"""One factor of a layer fitted beside the others, in the metrics of a problem.

    least over f of  tr( B (W - a(f)) A (W - a(f))' )        a is linear

Conjugate gradients lower this quadratic without its matrix: the transposed product with ``a`` comes from torch's
differentiation. A step never raises the error, so few of them do no harm. In turns over factors it is alternating least
squares (Kolda and Bader 2009, Tensor Decompositions and Applications, section 3.4).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from regauge.passes.factorization.problems import Problem

_STEPS = 12


def bettered(
    problem: Problem,
    image: Callable[[torch.Tensor], torch.Tensor],
    factor: torch.Tensor,
    divided: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient,
    steps: int = _STEPS,
) -> torch.Tensor:
    """The factor after some steps; ``image`` gives the matrix [outputs, columns] of one, and is linear.

    ``divided`` is a gradient divided by a positive definite guess at the curvature, with which steps go further.
    """

    def transposed(matrix: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            variable = torch.zeros_like(factor).requires_grad_(True)
            (found,) = torch.autograd.grad(image(variable), variable, matrix)
        return found

    residual = transposed(problem.weighed(problem.weight - image(factor)))
    direction = divided(residual)
    energy = (residual * direction).sum()
    for _ in range(steps):
        moved = transposed(problem.weighed(image(direction)))
        curvature = (direction * moved).sum()
        if not float(curvature) > 0:
            break
        length = energy / curvature
        factor = factor + length * direction
        residual = residual - length * moved
        downhill = divided(residual)
        before, energy = energy, (residual * downhill).sum()
        direction = downhill + energy / before * direction
    return factor
