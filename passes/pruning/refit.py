"""One layer's weight fitted to moments, taken only where it lowers the layer's error.

Where rows are not many times the columns, a fit can follow the rows it was made from and be wrong on all others. Then
each half of the rows judges a fit to the other half, how near the weight stays to what it was (the ridge) is chosen by
that, and where nothing helps on rows that the fit did not see, the weight stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Halves, factor_of, least_squares, ridge_of

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
    if halves.rows < halves.columns and all(part.rows and part.scarce for part in halves.parts):
        return _fitted_to_rows(halves, weight, bias, free)
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
    if one.scarce and other.scarce:
        rows = (one.kept_rows(), other.kept_rows())
        rests = [y - x @ before[:, :-1].t() - before[:, -1] for x, y in rows]
        return _judged_by_rows([x for x, _ in rows], rests, bias)
    errors, base = dict.fromkeys(_RIDGES, 0.0), 0.0
    for fit, test in ((one, other), (other, one)):
        base += test.error(before[:, :-1], before[:, -1])
        for share in _RIDGES:
            solved = least_squares(fit, before, share, bias=bias)
            errors[share] += test.error(solved[:, :-1], solved[:, -1])
    best = min(errors, key=lambda share: errors[share])
    return best if errors[best] < base else None


# -- fewer rows than columns -------------------------------------------------------------------------------------------


def _fitted_to_rows(
    halves: Halves, weight: torch.Tensor, bias: torch.Tensor, free: bool
) -> tuple[torch.Tensor, ...] | None:
    """Like :func:`fitted`, of fewer rows than columns: three products as large as the layer's own are all it takes.

    With the rest R = Y - X W0' - b and K = XX', W = W0 + R'(K + r)^-1 X, of X and R about their means where there is a
    bias, which takes these.
    """
    dtype = halves.parts[0].dtype
    given = [part.rows_as_given() for part in halves.parts]
    rests = [y.to(dtype) - _given(x, weight, dtype) - bias.to(dtype) for x, y in given]
    known = [x.to(dtype) for x, _ in given]
    share = _judged_by_rows(known, rests, free)
    if share is None:
        return None
    x, rest = torch.cat(known), torch.cat(rests)
    mean_x, mean_rest = (x.mean(0), rest.mean(0)) if free else (torch.zeros_like(x[0]), torch.zeros_like(rest[0]))
    about = x - mean_x
    factor = factor_of(about @ about.t(), ridge_of(float(x.square().sum()), halves.columns, share))
    change = torch.cholesky_solve(rest - mean_rest, factor).t() @ about
    new, shifted = (weight + change).to(weight.dtype), bias + (mean_rest - change @ mean_x)
    if not bool(new.isfinite().all() and shifted.isfinite().all()):
        return None
    left = [y.to(dtype) - _given(x, new, dtype) - shifted.to(dtype) for x, y in given]
    return (new, shifted) if _square(left) < _square(rests) else None


def _given(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """X W' as the layer gives it where both are bfloat16, which processors multiply several times as fast."""
    if x.dtype == weight.dtype == torch.bfloat16:
        return (x @ weight.t()).to(dtype)
    return x.to(dtype) @ weight.to(dtype).t()


def _square(parts: Sequence[torch.Tensor]) -> float:
    return sum(float(part.double().square().sum()) for part in parts)


def _judged_by_rows(known: Sequence[torch.Tensor], rests: Sequence[torch.Tensor], bias: bool) -> float | None:
    """Like :func:`judged`, by the rows X of each half and the rest R = Y - X W0' - b of what they should give.

    A fit to one half predicts K_tf (K_ff + r)^-1 R_f of the rest of the other: no weight is made.
    """
    base = _square(rests)
    errors = dict.fromkeys(_RIDGES, 0.0)
    for fit in (0, 1):
        x, rest = known[fit], rests[fit]
        mean_x, mean_rest = (x.mean(0), rest.mean(0)) if bias else (torch.zeros_like(x[0]), torch.zeros_like(rest[0]))
        about, square = x - mean_x, float(x.square().sum())
        inner, across = about @ about.t(), (known[1 - fit] - mean_x) @ about.t()
        for share in _RIDGES:
            factor = factor_of(inner, ridge_of(square, x.shape[1], share))
            left = rests[1 - fit] - mean_rest - across @ torch.cholesky_solve(rest - mean_rest, factor)
            errors[share] += _square([left])
    best = min(errors, key=lambda share: errors[share])
    return best if errors[best] < base else None
