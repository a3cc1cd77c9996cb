"""Bettering a mask of a layer that is too large for exact exchanges: all other weights of the row are held fixed.

With g = (W* - W) H, giving up the kept entry i and taking in j of its group changes the error of the row by

    H_ii w_i^2 + 2 w_i g_i - (g_j + H_ij w_i)^2 / H_jj         with  w_j = (g_j + H_ij w_i) / H_jj

which is no less than what it changes once the row is refitted, so every exchange that is made lowers the error. Each
row makes its best one, g follows by two rows of H, and from time to time all kept weights are refitted. Time: rows x
columns x group for each exchange; memory: a few matrices of the weight's size.
"""

from __future__ import annotations

import torch

from regauge.passes.calibration.quadratic import Quadratic, refit

_BETWEEN_REFITS = 16  # exchanges
_SHORTLIST = 16  # entries on either side that are looked at where a whole row is the group
_LEAST_GAIN = 1e-6  # share of a row's error that an exchange has to save


def exchange_with_fixed(
    problem: Quadratic, kept: torch.Tensor, start: torch.Tensor, group: int, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bettered mask and the refitted weight, both [outputs, columns]; arguments as of ``swaps.exchange``.

    ``start`` is a weight with this mask, from which the first refit sets out.
    """
    kept, weight, hessian = kept.clone(), start, problem.hessian
    every = torch.arange(len(kept))
    for round_ in range(most):
        if round_ % _BETWEEN_REFITS == 0:
            weight = refit(problem, kept, weight)
            gradient = (problem.optimum - weight) @ hessian
            least = _LEAST_GAIN * problem.losses(weight)
        goes, comes = _candidates(problem, kept, weight, gradient, group)
        change, one, other = _best(problem, kept, weight, gradient, goes, comes)
        better = change < -least
        if not better.any():
            if round_ % _BETWEEN_REFITS == 0:
                break
            continue
        rows, i, j = every[better], one[better], other[better]
        gone = weight[rows, i]
        new = (gradient[rows, j] + hessian[i, j] * gone) / hessian[j, j]
        gradient[rows] += gone[:, None] * hessian[i] - new[:, None] * hessian[j]
        weight[rows, i], weight[rows, j] = 0.0, new
        kept[rows, i], kept[rows, j] = False, True
    return kept, refit(problem, kept, weight)


def _candidates(
    problem: Quadratic, kept: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries that may change places, [rows, sets, entries] on either side; those of one set may."""
    rows, columns = kept.shape
    if group < columns or columns <= _SHORTLIST:
        places = torch.arange(columns).reshape(1, -1, group).expand(rows, -1, -1)
        return places, places
    diagonal = problem.hessian.diag()
    price = torch.where(kept, diagonal * weight.square(), torch.inf)
    gain = torch.where(kept, -torch.inf, gradient.square() / diagonal)
    return price.topk(_SHORTLIST, 1, largest=False).indices[:, None], gain.topk(_SHORTLIST, 1).indices[:, None]


def _best(
    problem: Quadratic,
    kept: torch.Tensor,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    goes: torch.Tensor,
    comes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each row the change of the error by its best exchange, the entry that goes and the one that comes."""
    hessian, diagonal = problem.hessian, problem.hessian.diag()
    every = torch.arange(len(kept))[:, None, None]
    gone = weight[every, goes]
    price = diagonal[goes] * gone.square() + 2 * gone * gradient[every, goes]
    slope = gradient[every, comes][:, :, None, :] + hessian[goes[..., None], comes[:, :, None]] * gone[..., None]
    change = price[..., None] - slope.square() / diagonal[comes][:, :, None, :]
    valid = kept[every, goes][..., None] & ~kept[every, comes][:, :, None, :]
    best, place = torch.where(valid, change, torch.inf).reshape(len(kept), -1).min(1)
    number, one, other = torch.unravel_index(place, change.shape[1:])
    rows = every[:, 0, 0]
    return best, goes[rows, number, one], comes[rows, number, other]
