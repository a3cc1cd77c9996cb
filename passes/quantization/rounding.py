"""Which codes a weight gets: the nearest ones, or those that change least of what the layer gives on data.

The error is the quadratic form of :mod:`regauge.passes.calibration.quadratic`, tr((Q - W*) H (Q - W*)').

columns   column by column, the columns behind making up for each rounding (Frantar et al. 2022, GPTQ), those of the
          greatest inputs first, with the scales of groups fixed beforehand
descent   from there coordinate descent over single codes (Behdin et al. 2023, QuantEase, algorithm 1), in turns with
          the scales that are best beside the codes, which is least squares in the scales of a row
"""

from __future__ import annotations

import torch

from regauge.passes.calibration.quadratic import Quadratic, factor_of_inverse
from regauge.passes.quantization.grid import Coded, Grid, rounded

_BLOCK = 128  # columns whose updates of those behind are made together
_TURNS = 4  # of codes and scales
_SWEEPS = 3  # over all columns in a turn
_ROWS_OF_SCALES = 1 << 24  # numbers held at a time while scales are solved for


def by_columns(problem: Quadratic, grid: Grid, group: int) -> Coded:
    """The codes that GPTQ finds."""
    start = rounded(problem.optimum, grid, group, problem.hessian.diag())
    order = problem.hessian.diag().argsort(descending=True)
    weight = problem.optimum[:, order].clone()
    scale, zero = start.spread(start.scale)[:, order], start.spread(start.zero)[:, order]
    upper = factor_of_inverse(problem.hessian[order][:, order])
    codes = torch.empty_like(weight)
    columns = weight.shape[1]
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        errors = torch.empty(len(weight), last - first, dtype=weight.dtype)
        for column in range(first, last):
            codes[:, column] = grid.codes(weight[:, column], scale[:, column], zero[:, column])
            given = (codes[:, column] - zero[:, column]) * scale[:, column]
            error = (weight[:, column] - given) / upper[column, column]
            weight[:, column:last] -= torch.outer(error, upper[column, column:last])
            errors[:, column - first] = error
        weight[:, last:] -= errors @ upper[first:last, last:]
    return start.with_codes(codes[:, order.argsort()])


def by_descent(problem: Quadratic, grid: Grid, group: int) -> Coded:
    """Codes and scales bettered in turns until neither gains any more."""
    best = by_columns(problem, grid, group)
    least = problem.losses(best.values)
    for _ in range(_TURNS):
        found = _swept(problem, best)
        found = found.with_scale(_best_scales(problem, found))
        losses = problem.losses(found.values)
        better = losses < least
        if not bool(better.any()):
            break
        gained = float((least - losses).clamp(min=0).sum() / least.sum().clamp(min=1e-300))
        best = Coded(
            grid,
            torch.where(better[:, None], found.codes, best.codes),
            torch.where(better[:, None], found.scale, best.scale),
            best.zero,
        )
        least = torch.minimum(least, losses)
        if gained < 1e-3:
            break
    return best


def _swept(problem: Quadratic, coded: Coded) -> Coded:
    """Each column in turn gets the codes that are best beside all others, a few times over."""
    hessian, grid = problem.hessian, coded.grid
    scale, zero = coded.spread(coded.scale), coded.spread(coded.zero)
    codes, diagonal = coded.codes.clone(), hessian.diag()
    weight = coded.values
    columns = weight.shape[1]
    for _ in range(_SWEEPS):
        gradient = (weight - problem.optimum) @ hessian
        for first in range(0, columns, _BLOCK):
            last = min(first + _BLOCK, columns)
            moved = torch.zeros(len(weight), last - first, dtype=weight.dtype)
            for column in range(first, last):
                slope = gradient[:, column] + moved[:, : column - first] @ hessian[first:column, column]
                wanted = weight[:, column] - slope / diagonal[column]
                codes[:, column] = grid.codes(wanted, scale[:, column], zero[:, column])
                given = (codes[:, column] - zero[:, column]) * scale[:, column]
                moved[:, column - first] = given - weight[:, column]
                weight[:, column] = given
            gradient[:, last:] += moved @ hessian[first:last, last:]
    return coded.with_codes(codes)


def _best_scales(problem: Quadratic, coded: Coded) -> torch.Tensor:
    """The scales [rows, groups] of least error beside the codes; one that would not be positive stays."""
    rows, groups = coded.scale.shape
    units = (coded.codes - coded.spread(coded.zero)).reshape(rows, groups, coded.group)
    wanted = (problem.optimum @ problem.hessian).reshape(rows, groups, coded.group)
    right = (units * wanted).sum(2)
    hessian = problem.hessian.reshape(groups, coded.group, groups, coded.group)
    found = torch.empty_like(coded.scale)
    step = max(1, _ROWS_OF_SCALES // (groups * groups * coded.group))
    for first in range(0, rows, step):
        part = units[first : first + step]
        image = torch.einsum("rgk,gkhl->rghl", part, hessian)
        system = torch.einsum("rghl,rhl->rgh", image, part)
        system.diagonal(dim1=1, dim2=2).add_(1e-9 * system.diagonal(dim1=1, dim2=2).amax(1)[:, None].clamp(min=1e-30))
        found[first : first + step] = torch.linalg.solve(system, right[first : first + step, :, None])[..., 0]
    return torch.where(found > 0, found, coded.scale)
