"""Kernels as sums of outer products (canonical polyadic decompositions) by alternating least squares.

    W[o, a, b, ...] = sum over q  up[o, q] first[q, a] second[q, b] ...

Each factor in turn is the best beside the others, in closed form (Kolda and Bader 2009, Tensor Decompositions and
Applications, section 3.4). Terms that nearly cancel each other may grow without bound where no best sum exists (there,
section 3.3); a small ridge holds them (section 3.4 names this, too), and loses less at the same number of turns.
Where alternation ends depends on where it starts: of several starts all take some turns, the best takes the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.passes.calibration.moments import factor_of

_FIRST_TURNS = 30  # from each start
_TURNS = 150  # in all, from the best
_GAIN = 5e-4  # of the error in a turn, below which there is no other
_RIDGE = 1e-3  # of the mean of a curvature
_ROUNDING = 1e-12  # of the kernel, to which errors are told

Factors = list[torch.Tensor]
"""The rows [rank, size] of each axis but the first, then ``up`` [outputs, rank]."""


def decomposed(weight: torch.Tensor, starts: Sequence[Factors]) -> Factors:
    """The best of what the ``starts`` lead to, of ``weight`` [outputs, columns]."""
    found = [in_turns(weight, start, _FIRST_TURNS) for start in starts]
    best = min(range(len(found)), key=lambda place: found[place][1])
    return in_turns(weight, found[best][0], _TURNS - _FIRST_TURNS)[0]


def in_turns(weight: torch.Tensor, factors: Factors, turns: int) -> tuple[Factors, float]:
    """The factors after up to so many turns, as long as each lowers the error by a share, and their squared error."""
    best, least = factors, float("inf")
    for _ in range(turns):
        factors, error = _turn(weight, factors)
        if not error < least:
            break
        gained = least - error
        best, least = factors, error
        if gained < _GAIN * error:
            break
    return best, least


def random_start(rank: int, sizes: Sequence[int], outputs: int, seed: int) -> Factors:
    """Independent normal entries."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(rank, size, generator=generator, dtype=torch.float64) for size in sizes]
    return [*rows, torch.randn(outputs, rank, generator=generator, dtype=torch.float64)]


def terms(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[rank, columns]: the outer product of the rows of all factors."""
    found = factors[0]
    for factor in factors[1:]:
        found = (found[:, :, None] * factor[:, None, :]).flatten(1)
    return found


def _turn(weight: torch.Tensor, factors: Factors) -> tuple[Factors, float]:
    """Each factor beside the others, and the squared error: rows get length 1, ``up`` has the lengths."""
    *rows, up = factors
    moved = (up.t() @ weight).reshape(up.shape[1], *(row.shape[1] for row in rows))
    for axis in range(len(rows)):
        others = [up.t(), *(row for other, row in enumerate(rows) if other != axis)]
        wanted = (moved.movedim(axis + 1, 1).flatten(2) @ terms(others[1:])[:, :, None])[:, :, 0]
        found = _solved(others, wanted)
        rows[axis] = found / found.norm(dim=1, keepdim=True).clamp(min=1e-300)
    products = weight @ terms(rows).t()
    up = _solved(rows, products.t()).t()
    energy = float(weight.square().sum())
    kept = 2 * (up * products).sum() - (up.t() @ up * _curvature(rows)).sum()
    return [*rows, up], max(energy - float(kept), _ROUNDING * energy)


def _solved(others: Sequence[torch.Tensor], wanted: torch.Tensor) -> torch.Tensor:
    """The rows of a factor, [rank, size], by their products with the kernel and the other factors' rows."""
    curvature = _curvature(others)
    lower = factor_of(curvature, max(_RIDGE * float(curvature.diagonal().mean()), 1e-300))
    return torch.cholesky_solve(wanted, lower)


def _curvature(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[rank, rank]: the products of all terms with each other."""
    found = factors[0] @ factors[0].t()
    for factor in factors[1:]:
        found = found * (factor @ factor.t())
    return found
