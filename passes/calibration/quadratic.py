"""What a layer's error on data is as a function of its weight alone, and its least value over weights with given zeros.

    sum of |y - W x - b|^2 over rows  +  r |W - W0|^2   =   tr( (W - W*) H (W - W*)' ) + constant     for the best b

with H = X'X + r I of centred inputs and W* the dense least-squares weight. Rows of W do not meet, and on a support S a
row is least at w_S = [H_SS]^-1 [H w*]_S (Frantar and Alistarh 2022, Optimal Brain Compression, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regauge.passes.calibration.moments import Moments, factor_of

_STEPS = 200  # conjugate gradient steps at most
_ROUNDING = 1e-5  # of the mean square of a column: what single precision, in which moments are summed, may get wrong
_CLOSE = 1e-5  # norm of what is left of the gradient, as a share of the first one's


@dataclass
class Quadratic:
    """``hessian`` [columns, columns], ``optimum`` [outputs, columns], and the means that give the bias.

    ``ridge`` is what the diagonal of ``hessian`` has beside what the data gave.
    """

    hessian: torch.Tensor
    optimum: torch.Tensor
    input_mean: torch.Tensor
    target_mean: torch.Tensor
    ridge: float = 0.0

    def bias(self, weight: torch.Tensor) -> torch.Tensor:
        """The best bias beside a weight."""
        return self.target_mean - weight @ self.input_mean

    def losses(self, weight: torch.Tensor) -> torch.Tensor:
        """What each row [outputs] of a weight adds to the error of the optimum."""
        off = weight - self.optimum
        return ((off @ self.hessian) * off).sum(1)

    def ordered(self, columns: torch.Tensor) -> Quadratic:
        """The same with the columns in another order."""
        hessian, optimum = self.hessian[columns][:, columns], self.optimum[:, columns]
        return Quadratic(hessian, optimum, self.input_mean[columns], self.target_mean, self.ridge)


def least_error(found: Moments, weight: torch.Tensor, bias: torch.Tensor, share: float, *, free: bool) -> Quadratic:
    """The error against the targets in ``found.cross``; r is a ``share`` of the mean square of a column.

    ``weight`` [outputs, columns] and ``bias`` [outputs] are what the layer had. Unless the bias is ``free`` it stays.
    """
    gram, cross, mean, target = _centred(found, bias, free)
    amount = _ridge(gram, found, share)
    gram.diagonal().add_(amount)
    optimum = torch.linalg.solve(gram, (cross + weight * amount).t()).t()
    return Quadratic(gram, optimum, mean, target, amount)


def change_of_output(
    found: Moments, weight: torch.Tensor, bias: torch.Tensor, share: float, *, free: bool = False
) -> Quadratic:
    """The change of the layer's own output: its weight is the optimum. Unless it is ``free`` the bias stays."""
    gram, sums = found.gram[:-1, :-1], found.gram[-1, :-1]
    mean = sums / found.gram[-1, -1] if free and found.rows else torch.zeros_like(sums)
    gram = gram - torch.outer(sums, mean)
    amount = _ridge(gram, found, share)
    gram.diagonal().add_(amount)
    return Quadratic(gram, weight, mean, bias + weight @ mean, amount)


def least_through(
    found: Moments, weight: torch.Tensor, bias: torch.Tensor, rows: torch.Tensor, *, free: bool, own: bool
) -> tuple[torch.Tensor, Quadratic]:
    """The U [outputs, rank] with which U ``rows`` [rank, columns] has the least error; and the error, about U rows.

    Without a ridge, so that a weight made of these rows comes out as it is. Where ``own`` is given targets are those of
    the weight itself.
    """
    gram, cross, mean, target = _centred(found, bias, free)
    if own:
        cross, target = weight @ gram, bias + weight @ mean
    seen = rows @ gram
    root = factor_of(seen @ rows.T, 1e-14 * float(gram.diagonal().mean() * rows.square().mean()))
    up = torch.cholesky_solve((cross @ rows.T).T, root).T
    return up, Quadratic(gram, up @ rows, mean, target)


def _centred(
    found: Moments, bias: torch.Tensor, free: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    gram, cross, sums = found.gram[:-1, :-1], found.cross[:, :-1], found.gram[-1, :-1]
    if not free or not found.rows:
        return gram, cross - torch.outer(bias, sums), torch.zeros_like(sums), bias
    rows = found.gram[-1, -1]
    mean, target = sums / rows, found.cross[:, -1] / rows
    return gram - torch.outer(sums, mean), cross - torch.outer(target, sums), mean, target


def _ridge(gram: torch.Tensor, found: Moments, share: float) -> float:
    """A share of the mean square of a centred column, and more than rounding where the inputs hardly vary.

    There centring cancels, and weights would be fitted to what rounding has left, which may be indefinite.
    """
    whole = float(found.gram.diag()[:-1].mean())
    return max(float(gram.diag().mean()) * share, whole * _ROUNDING, 1e-12)


def refit(problem: Quadratic, kept: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The weight [outputs, columns] of least error with zeros outside of ``kept``, from ``start``.

    Conjugate gradients with a diagonal preconditioner, all rows side by side (Meng et al. 2024, ALPS, section 3.2).
    """
    mask = kept.to(problem.optimum.dtype)
    scale = 1 / problem.hessian.diag()
    weight = start * mask
    residual = ((problem.optimum - weight) @ problem.hessian) * mask
    enough = _CLOSE * float(((problem.optimum @ problem.hessian) * mask).norm())
    direction = residual * scale
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(_STEPS):
        if float(residual.norm()) <= enough:
            break
        image = (direction @ problem.hessian) * mask
        length = energy / (direction * image).sum(1, keepdim=True).clamp(min=1e-300)
        weight = weight + length * direction
        residual = residual - length * image
        step = residual * scale
        next_energy = (residual * step).sum(1, keepdim=True)
        direction = step + next_energy / energy.clamp(min=1e-300) * direction
        energy = next_energy
    return weight


def factor_of_inverse(hessian: torch.Tensor) -> torch.Tensor:
    """The upper triangular U with H^-1 = U'U: that of H = R R' with R upper is R^-1, which needs no inverse of H."""
    root = factor_of(hessian.flip(0, 1), 0.0).flip(0, 1)
    upper: torch.Tensor = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=True)
    return upper
