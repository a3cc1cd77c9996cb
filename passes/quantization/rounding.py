"""Which codes a weight gets: the nearest ones, or those that change least of what the layer gives on data.

The error is the quadratic form of :mod:`regauge.passes.calibration.quadratic`, tr((Q - W*) H (Q - W*)').

columns   column by column, the columns behind making up for each rounding (Frantar et al. 2022, GPTQ), those of the
          greatest inputs first, with the scales of groups fixed beforehand
descent   from there, and anew with the scales that are best beside those codes, which is least squares in the scales of
          a row; then coordinate descent over single codes (Behdin et al. 2023, QuantEase, algorithm 1), in turns with
          such scales
"""

from __future__ import annotations

from typing import TypeVar

import torch

from regauge.passes.calibration.quadratic import Quadratic, factor_of_inverse
from regauge.passes.quantization.formats import Coding

_BLOCK = 128  # columns whose updates of those behind are made together
_ROUNDS = 2  # of columns and scales, before descent
_TURNS = 4  # of codes and scales
_SWEEPS = 3  # over all columns in a turn
_ROWS_OF_SCALES = 1 << 24  # numbers held at a time while scales are solved for

C = TypeVar("C", bound=Coding)


def by_columns(problem: Quadratic, start: C) -> C:
    """The codes that GPTQ finds, beside the scales (or tables) of a start."""
    order = problem.hessian.diag().argsort(descending=True)
    weight = problem.optimum[:, order].clone()
    upper = factor_of_inverse(problem.hessian[order][:, order])
    codes = torch.empty_like(weight)
    columns = weight.shape[1]
    places = order.tolist()
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        errors = torch.empty(len(weight), last - first, dtype=weight.dtype)
        for column in range(first, last):
            codes[:, column] = start.nearest(weight[:, column], places[column])
            error = (weight[:, column] - start.given(codes[:, column], places[column])) / upper[column, column]
            weight[:, column:last] -= torch.outer(error, upper[column, column:last])
            errors[:, column - first] = error
        weight[:, last:] -= errors @ upper[first:last, last:]
    return start.with_codes(codes[:, order.argsort()])


def by_descent(problem: Quadratic, start: C) -> C:
    """Codes, and what is free beside them, bettered in turns until neither gains any more.

    First as GPTQ finds codes, anew with what is best beside those that it found: then by single codes.
    """
    best = by_columns(problem, start)
    least = _losses(problem, best)
    for _ in range(_ROUNDS):
        fitted = best.refitted(problem)
        if fitted is best:
            break
        found = by_columns(problem, fitted)
        losses = _losses(problem, found)
        best, least = best.with_rows(found, losses < least), torch.minimum(least, losses)
    for _ in range(_TURNS):
        found = _swept(problem, best).refitted(problem)
        losses = _losses(problem, found)
        better = losses < least
        if not bool(better.any()):
            break
        gained = float((least - losses).clamp(min=0).sum() / least.sum().clamp(min=1e-300))
        best, least = best.with_rows(found, better), torch.minimum(least, losses)
        if gained < 1e-3:
            break
    return best


def _losses(problem: Quadratic, coded: Coding) -> torch.Tensor:
    """The error of each row; where rows share something that of all."""
    losses = problem.losses(coded.values)
    return losses.sum().expand(len(losses)) if coded.shared else losses


def _swept(problem: Quadratic, coded: C) -> C:
    """Each column in turn gets the codes that are best beside all others, a few times over."""
    hessian = problem.hessian
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
                codes[:, column] = coded.nearest(wanted, column)
                given = coded.given(codes[:, column], column)
                moved[:, column - first] = given - weight[:, column]
                weight[:, column] = given
            gradient[:, last:] += moved @ hessian[first:last, last:]
    return coded.with_codes(codes)


def best_scales(problem: Quadratic, units: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The scales [rows, groups] of least error by which groups of numbers [rows, columns] go; one that would not be
    positive stays what it was ``before``."""
    rows, groups = before.shape
    group = units.shape[1] // groups
    parts = units.reshape(rows, groups, group)
    wanted = (problem.optimum @ problem.hessian).reshape(rows, groups, group)
    right = (parts * wanted).sum(2)
    hessian = problem.hessian.reshape(groups, group, groups, group)
    found = torch.empty_like(before)
    step = max(1, _ROWS_OF_SCALES // (groups * groups * group))
    for first in range(0, rows, step):
        part = parts[first : first + step]
        image = torch.einsum("rgk,gkhl->rghl", part, hessian)
        system = torch.einsum("rghl,rhl->rgh", image, part)
        system.diagonal(dim1=1, dim2=2).add_(1e-9 * system.diagonal(dim1=1, dim2=2).amax(1)[:, None].clamp(min=1e-30))
        found[first : first + step] = torch.linalg.solve(system, right[first : first + step, :, None])[..., 0]
    return torch.where(found > 0, found, before)
