"""One layer's weight fitted to moments, taken only where it lowers the layer's error.

Where rows are not many times the columns, a fit can follow the rows it was made from and be wrong on all others. Then
each half of the rows judges a fit to the other half, how near the weight stays to what it was (the ridge) is chosen by
that, and where nothing helps on rows that the fit did not see, the weight stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Halves, Moments, factor_of, least_squares, ridge_of

RIDGE = 3e-2  # share of the mean square of a column
_RIDGES = (RIDGE, 10 * RIDGE, 100 * RIDGE, 1000 * RIDGE)  # tried where rows are few
_MANY = 10  # so many times the columns are enough rows to go by the error on these


def refitted(layer: Layer, moments: Sequence[Halves]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The weight as it is stored, and the shift [blocks x outputs] of its result; None where no block gains by one."""
    before = layer.matrices(layer.weight.tensor.detach())
    bias = torch.zeros(layer.blocks, layer.outputs, dtype=torch.float64)
    if layer.bias is not None:
        bias += layer.bias.tensor.detach().double().reshape(bias.shape)
    free = layer.shifted(torch.zeros(bias.numel(), dtype=torch.float64)) is not None
    found, shift = before.clone(), torch.zeros_like(bias)
    taken = False
    for block, own in enumerate(moments):
        new = fitted(own, before[block], bias[block], free) if own.rows else None
        if new is not None:
            found[block], shift[block] = new[0], new[1] - bias[block]
            taken = True
    return (layer.from_matrices(found), shift.reshape(-1)) if taken else None


def fitted(halves: Halves, weight: torch.Tensor, bias: torch.Tensor, free: bool) -> tuple[torch.Tensor, ...] | None:
    """A weight in the type of the old one, and a bias, that have a lower error than these; None where none is found."""
    dtype = halves.parts[0].dtype
    both = torch.cat([weight.to(dtype), bias[:, None].to(dtype)], 1)
    share = judged(halves, both, bias=free) if halves.rows < _MANY * halves.columns else RIDGE
    if share is None:
        return None
    found = halves.together()
    solved = least_squares(found, both, share, bias=free)
    new, shifted = solved[:, :-1].to(weight.dtype), solved[:, -1].double() if free else bias
    if not bool(new.isfinite().all() and shifted.isfinite().all()):
        return None
    return (new, shifted) if found.error(new, shifted) < found.error(weight, bias) else None


def judged(halves: Halves, before: torch.Tensor, *, bias: bool) -> float | None:
    """The ridge whose fits to a half of the rows have the lowest error on the other; None where none lowers it.

    ``before`` is the weight [outputs, columns] and, in the last column, the bias.
    """
    one, other = halves.parts
    if not one.rows or not other.rows:
        return None
    errors, base = dict.fromkeys(_RIDGES, 0.0), 0.0
    for fit, test in ((one, other), (other, one)):
        base += test.error(before[:, :-1], before[:, -1])
        if fit.scarce and test.scarce:
            for share, error in _predicted(fit, test, before, bias=bias):
                errors[share] += error
            continue
        for share in _RIDGES:
            solved = least_squares(fit, before, share, bias=bias)
            errors[share] += test.error(solved[:, :-1], solved[:, -1])
    best = min(errors, key=lambda share: errors[share])
    return best if errors[best] < base else None


def _predicted(fit: Moments, test: Moments, before: torch.Tensor, *, bias: bool) -> list[tuple[float, float]]:
    """The errors on ``test`` of fits to ``fit``, for each ridge, of which only the predictions are made.

    With the rest R = Y - X W0' and K = XX', the one gets K_tf (K_ff + r)^-1 R_f from the other.
    """
    (x, y), (x_test, y_test) = fit.kept_rows(), test.kept_rows()
    rest, rest_test = (y - x @ before[:, :-1].t() - before[:, -1] for x, y in ((x, y), (x_test, y_test)))
    mean_x, mean_rest = (x.mean(0), rest.mean(0)) if bias else (torch.zeros_like(x[0]), torch.zeros_like(rest[0]))
    known = x - mean_x
    inner, across, square = known @ known.t(), (x_test - mean_x) @ known.t(), float(x.square().sum())
    found = []
    for share in _RIDGES:
        factor = factor_of(inner, ridge_of(square, fit.columns, share))
        left = rest_test - mean_rest - across @ torch.cholesky_solve(rest - mean_rest, factor)
        found.append((share, float(left.double().square().sum())))
    return found
