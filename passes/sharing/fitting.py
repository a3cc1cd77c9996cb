"""What layers of several blocks have in common, as closely as each layer's metrics ask (:class:`.problems.Problem`).

    shared     W_l = W + R_l, rank R_l <= r                one matrix and low-rank residuals
    atoms      W_l = sum over s of c_ls A_s                few matrices, of which each layer is a mixture

Without metrics the best W is the mean and the best atoms are the first principal ones of the layers (MASA). With those
of data both are least squares in turns: W or A with conjugate gradients, R_l or c_l in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch

from regauge.passes.factorization.problems import Problem

Start: TypeAlias = Literal["fit", "average", "stepwise", "lower"]

_TURNS = 10
_STEPS = 12  # of conjugate gradients in each turn
_CLOSE = 1e-6  # what is left of the gradient, as a share of the first


def shared(problems: Sequence[Problem], rank: int) -> torch.Tensor:
    """The matrix [outputs, columns] that loses least beside residuals of a rank.

    Of two layers the mean is a saddle: their residuals are each other's negatives, where together they could have twice
    the rank. There the start is the first of them.
    """
    weights = [problem.weight for problem in problems]
    found = weights[0] if rank and len(weights) == 2 else _common(problems, weights, torch.stack(weights).mean(0))
    for _ in range(_TURNS if rank else 0):
        rest = [p.weight - residual(p, found, rank) for p in problems]
        found = _common(problems, rest, found)
    return found


def residual(problem: Problem, matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The best matrix of a rank to add to a shared one."""
    up, down = without(problem, matrix).factored.of_rank(rank)
    return up @ down


def without(problem: Problem, matrix: torch.Tensor) -> Problem:
    """What a shared matrix leaves of a layer, in the same metrics."""
    return Problem(problem.layer, problem.weight - matrix, problem.inputs, problem.outputs)


def _common(problems: Sequence[Problem], weights: Sequence[torch.Tensor], start: torch.Tensor) -> torch.Tensor:
    """Least over W of the sum of the errors of W for each of these weights."""
    if problems[0].inputs is None:
        return torch.stack(list(weights)).mean(0)

    def image(matrix: torch.Tensor) -> torch.Tensor:
        return sum((p.weighed(matrix) / p.scale for p in problems), torch.zeros_like(matrix))

    wanted = sum((p.weighed(w) / p.scale for p, w in zip(problems, weights, strict=True)), torch.zeros_like(start))
    return solved(image, wanted, start)


def atoms(problems: Sequence[Problem], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Atoms [count, outputs, columns] and coefficients [layers, count]."""
    weights = torch.stack([problem.weight for problem in problems])
    flat = weights.flatten(1)
    _, vectors = torch.linalg.eigh(flat @ flat.t())
    first = vectors.flip(1)[:, :count]
    found = torch.einsum("ls,lij->sij", first, weights)
    if problems[0].inputs is None:
        return found, first
    for _ in range(_TURNS):
        mixture = torch.stack([coefficients(problem, found) for problem in problems])
        found = _mixed_atoms(problems, mixture, found)
    return found, torch.stack([coefficients(problem, found) for problem in problems])


def coefficients(problem: Problem, found: torch.Tensor) -> torch.Tensor:
    """The best mixture [count] of atoms for one layer."""
    weighed = torch.stack([problem.weighed(atom) for atom in found]).flatten(1)
    gram = weighed @ found.flatten(1).t()
    gram = (gram + gram.t()) / 2
    gram.diagonal().add_(1e-12 * float(gram.diagonal().mean()))
    solved: torch.Tensor = torch.linalg.solve(gram, weighed @ problem.weight.flatten())
    return solved


def _mixed_atoms(problems: Sequence[Problem], mixture: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Least over the atoms of the sum of the errors, each layer with its mixture."""

    def spread(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        weighed = torch.stack([p.weighed(m) / p.scale for p, m in zip(problems, matrices, strict=True)])
        return torch.einsum("ls,lij->sij", mixture, weighed)

    wanted = spread([problem.weight for problem in problems])
    return solved(lambda a: spread(list(torch.einsum("ls,sij->lij", mixture, a))), wanted, start)


def solved(image: Callable[[torch.Tensor], torch.Tensor], wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """``image`` (linear, positive) of what gives ``wanted``, by conjugate gradients from ``found``."""
    rest = wanted - image(found)
    direction, energy = rest, rest.square().sum()
    enough = _CLOSE**2 * float(wanted.square().sum())
    for _ in range(_STEPS):
        moved = image(direction)
        curvature = (direction * moved).sum()
        if float(energy) <= enough or not float(curvature) > 0:
            break
        length = energy / curvature
        found, rest = found + length * direction, rest - length * moved
        before, energy = energy, rest.square().sum()
        direction = rest + energy / before * direction
    return found
