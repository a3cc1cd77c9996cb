"""A matrix as a product of sparse factors: palm4MSA and its hierarchical form (Le Magoarou and Gribonval 2016, Flexible
Multilayer Sparse Approximations of Matrices and Applications, algorithms 2 and 3).

    least over S of  | X - a S_J ... S_1 |^2        S_j of unit norm, each with a number of entries that are not zero

A turn takes a gradient step on each factor beside the others, keeps its largest entries, and fits the scale a.
Hierarchically one factor is split off after another: what is left, T = a S_J ... S_l+1, is half as dense or so each
time, and all factors found so far are bettered together against X.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

_MARGIN = 1.05  # of the step's constant, whose norms are estimated
_POWER = 12  # steps of the power method
_GAIN = 1e-6  # of the error in a turn, below which there is no other


def sparse_factors(matrix: torch.Tensor, count: int, each: int, turns: int) -> list[torch.Tensor]:
    """``count`` factors of a matrix [rows, columns], that which is applied first in front.

    One is as large as the matrix, on its longer side, the others are square. Each has as many entries that are not zero
    as its longer side times ``each``. In each run of palm4MSA there are at most ``turns``.
    """
    if len(matrix) > matrix.shape[1]:
        return [own.t() for own in reversed(sparse_factors(matrix.t(), count, each, turns))]
    rows, columns = matrix.shape
    rest, found, sizes = matrix, list[torch.Tensor](), list[int]()
    for level in range(1, count):
        sizes.append(each * (columns if level == 1 else rows))
        left = round(rows * rows * min(1.0, each / rows) ** (level / (count - 1)))
        start = [torch.zeros_like(rest), torch.eye(rows, dtype=matrix.dtype)]
        scale, (first, rest) = _palm(rest, start, 1.0, [sizes[-1], left], turns)
        scale, every = _palm(matrix, [*found, first, rest], scale, [*sizes, left], turns)
        found, rest = every[:-1], scale * every[-1]
    return [*found, rest]


def _palm(
    target: torch.Tensor, factors: Sequence[torch.Tensor], scale: float, counts: Sequence[int], turns: int
) -> tuple[float, list[torch.Tensor]]:
    """Algorithm 2, from these factors; the scale and factors of unit norm."""
    found, before = list(factors), float("inf")
    for _ in range(turns):
        behind = [torch.eye(len(target), dtype=target.dtype)]  # what is applied after each factor
        for factor in reversed(found[1:]):
            behind.append(behind[-1] @ factor)
        right: torch.Tensor | None = None  # what is applied before
        for place, count in enumerate(counts):
            left, own = behind[-1 - place], found[place]
            image = own if right is None else own @ right
            gradient = left.t() @ (scale * (left @ image) - target)
            gradient = gradient if right is None else gradient @ right.t()
            bound = scale**2 * _squared_norm(left) * (1.0 if right is None else _squared_norm(right))
            found[place] = _largest(own - scale / max(_MARGIN * bound, 1e-300) * gradient, count)
            right = found[place] if right is None else found[place] @ right
        assert right is not None
        scale = float((target * right).sum() / right.square().sum().clamp(min=1e-300))
        error = float((target - scale * right).square().sum())
        if before - error <= _GAIN * error:
            break
        before = error
    return scale, found


def product(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """What factors are together, that which is applied first in front."""
    return reduce(lambda before, factor: factor @ before, factors)


def _largest(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """The largest entries, to unit norm."""
    if count < matrix.numel():
        kept = torch.zeros_like(matrix).flatten()
        places = matrix.abs().flatten().sort(descending=True, stable=True).indices[:count]
        kept[places] = matrix.flatten()[places]
        matrix = kept.reshape(matrix.shape)
    found: torch.Tensor = matrix / matrix.norm().clamp(min=1e-300)
    return found


def _squared_norm(matrix: torch.Tensor) -> float:
    """The square of the spectral norm, by the power method."""
    vector = matrix.t() @ matrix.sum(1)
    if not float(vector.norm()) > 0:
        vector = torch.ones_like(vector)
    for _ in range(_POWER):
        vector = vector / vector.norm().clamp(min=1e-300)
        vector = matrix.t() @ (matrix @ vector)
    return float(vector.norm())
