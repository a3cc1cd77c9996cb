"""One layer's weight fitted to moments, taken only where it lowers the layer's error.

Where there are fewer rows than columns, a fit can follow the rows it was made from and be wrong on all others. Then
each half of the rows judges a fit to the other half, how near the weight stays to what it was (the ridge) is chosen by
that, and where nothing helps on rows that the fit did not see, the weight stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Moments, factor_of, least_squares, ridge_of

RIDGE = 3e-2  # share of the mean square of a column
_RIDGES = (RIDGE, 10 * RIDGE, 100 * RIDGE)  # tried where rows are scarce


def refitted(layer: Layer, moments: Sequence[Moments]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The weight as it is stored, and the shift [blocks x outputs] of its result; None where no block gains by one."""
    before = layer.matrices(layer.weight.tensor.detach())
    bias = torch.zeros(layer.blocks, layer.outputs, dtype=torch.float64)
    if layer.bias is not None:
        bias += layer.bias.tensor.detach().double().reshape(bias.shape)
    free = layer.shifted(torch.zeros(bias.numel(), dtype=torch.float64)) is not None
    found, shift = before.clone(), torch.zeros_like(bias)
    taken = False
    for block, own in enumerate(moments):
        new = _fitted(own, before[block], bias[block], free) if own.rows else None
        if new is not None:
            found[block], shift[block] = new[0], new[1] - bias[block]
            taken = True
    return (layer.from_matrices(found), shift.reshape(-1)) if taken else None


def _fitted(found: Moments, weight: torch.Tensor, bias: torch.Tensor, free: bool) -> tuple[torch.Tensor, ...] | None:
    """A weight in the type of the old one, and a bias, that have a lower error than these; None where none is found."""
    before = torch.cat([weight.to(found.dtype), bias[:, None].to(found.dtype)], 1)
    share = judged_by_halves(found, before, bias=free) if found.scarce else RIDGE
    if share is None:
        return None
    solved = least_squares(found, before, share, bias=free)
    new, shifted = solved[:, :-1].to(weight.dtype), solved[:, -1].double() if free else bias
    if not bool(new.isfinite().all() and shifted.isfinite().all()):
        return None
    return (new, shifted) if found.error(new, shifted) < found.error(weight, bias) else None


def judged_by_halves(found: Moments, before: torch.Tensor, *, bias: bool) -> float | None:
    """The ridge with the lowest error on the half of the scarce rows that was not fitted; None where none lowers it.

    Fits in their dual form, of which only the predictions are made: with the rest R = Y - X W0' and K = XX', the half
    t gets K_tf (K_ff + r)^-1 R_f from the half f.
    """
    x, y = found.kept_rows()
    if len(x) < 2:
        return None
    rest = y - x @ before[:, :-1].t() - before[:, -1]
    errors = dict.fromkeys(_RIDGES, 0.0)
    middle = len(x) // 2
    halves = [(slice(0, middle), slice(middle, None)), (slice(middle, None), slice(0, middle))]
    for fit, test in halves:
        mean_x = x[fit].mean(0) if bias else torch.zeros_like(x[0])
        mean_rest = rest[fit].mean(0) if bias else torch.zeros_like(rest[0])
        known = x[fit] - mean_x
        inner, across = known @ known.t(), (x[test] - mean_x) @ known.t()
        for share in _RIDGES:
            amount = ridge_of(float(x[fit].square().sum()), found.columns, share)
            solved = torch.cholesky_solve(rest[fit] - mean_rest, factor_of(inner, amount))
            errors[share] += float((rest[test] - mean_rest - across @ solved).double().square().sum())
    best = min(errors, key=lambda share: errors[share])
    return best if errors[best] < float(rest.double().square().sum()) else None
