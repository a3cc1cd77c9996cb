"""Choosing a mask column by column, each removed entry made up for by the columns behind it.

The optimal brain surgeon for all rows at once (Frantar and Alistarh 2023, SparseGPT, algorithm 1): with the upper
Cholesky factor U of H^-1, the error (w_c - q_c) / U_cc of column c goes into the columns behind it as U_c,c: times it.
Masks are chosen when their columns are reached, by what these weigh then: for N:M group by group, else in blocks of
columns, whose updates of what lies behind are made together.

Beside the paper's w^2 / U_cc^2 of single entries, groups of few columns are taken jointly, w_P ([H^-1]_PP)^-1 w_P' over
all their masks: that is what removing the entries together costs.
"""

from __future__ import annotations

import torch

from regauge.passes.calibration.quadratic import Quadratic, factor_of_inverse
from regauge.passes.sparsity.patterns import MOST_AT_ONCE, Pattern


def prune_by_columns(
    problem: Quadratic, pattern: Pattern, share: float, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask and the weight, both [outputs, columns]; ``rows`` [outputs] says what a row's error weighs."""
    weight = problem.optimum.clone()
    upper = factor_of_inverse(problem.hessian)
    kept = torch.zeros_like(weight, dtype=torch.bool)
    columns, step = weight.shape[1], pattern.step
    block = max(1, MOST_AT_ONCE // step) * step
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros(len(weight), end - start, dtype=weight.dtype)
        for column in range(start, end):
            if (column - start) % step == 0:
                ahead = slice(column, min(column + step, end))
                part = upper[ahead, ahead]
                kept[:, ahead] = pattern.joint_mask(weight[:, ahead], part.t() @ part, rows, share)
            error = weight[:, column] * ~kept[:, column] / upper[column, column]
            weight[:, column:end] -= torch.outer(error, upper[column, column:end])
            weight[:, column] *= kept[:, column]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    return kept, weight
