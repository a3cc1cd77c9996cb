"""The best factors of a matrix in a metric: singular values of what a layer gives, not of its weight.

    least over rank r of  tr( B (W - W_r) A (W - W_r)' )        A: the metric of inputs, B: that of outputs

is the truncated singular value decomposition of B^1/2 W A^1/2, whose tail is the error. With A the second moments of
the inputs it is SVD-LLM (Wang et al. 2024), with A diagonal ASVD (Yuan et al. 2023), with B the outer products of the
outputs' gradients one side of GFWSVD (Chekalina et al. 2025). Where A only comes in products with W no root of it is
taken: the directions kept are the first principal ones of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regauge.passes.calibration.moments import factor_of


@dataclass(frozen=True)
class Factored:
    """``up`` [outputs, rank] times ``down`` [rank, columns], the most important directions first.

    ``tail[r]`` is the error once only the first r are kept, r from 0 to the rank.
    """

    up: torch.Tensor
    down: torch.Tensor
    tail: torch.Tensor

    def of_rank(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first directions, each as large in ``up`` as in ``down``."""
        up, down = self.up[:, :rank], self.down[:rank]
        share = (down.norm(dim=1) / up.norm(dim=0).clamp(min=1e-300)).sqrt().clamp(min=1e-150)
        return up * share, down / share[:, None]


def factored(weight: torch.Tensor, inputs: torch.Tensor | None = None, outputs: torch.Tensor | None = None) -> Factored:
    """The factors of ``weight`` [rows, columns] in the metrics ``inputs`` [columns, columns] and ``outputs`` [rows,
    rows], which are positive definite; without one in the plain one. All in double precision."""
    weight = weight.double()
    root = None if outputs is None else factor_of(outputs.double(), 0.0)
    scaled = weight if root is None else root.t() @ weight
    if len(weight) <= weight.shape[1]:
        image = scaled @ inputs.double() if inputs is not None else scaled
        values, vectors = principal(image @ scaled.t())
        return Factored(unscaled(vectors, root), vectors.t() @ scaled, _tail(values))
    if inputs is None:
        values, vectors = principal(scaled.t() @ scaled)
        return Factored(unscaled(scaled @ vectors, root), vectors.t(), _tail(values))
    lower = factor_of(inputs.double(), 0.0)
    whitened = scaled @ lower
    values, vectors = principal(whitened.t() @ whitened)
    down = torch.linalg.solve_triangular(lower.t(), vectors, upper=True).t()
    return Factored(unscaled(whitened @ vectors, root), down, _tail(values))


def unscaled(up: torch.Tensor, root: torch.Tensor | None) -> torch.Tensor:
    """What a root of the metric of outputs makes ``up`` [outputs, rank]."""
    if root is None:
        return up
    found: torch.Tensor = torch.linalg.solve_triangular(root.t(), up, upper=True)
    return found


def principal(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors of a positive semi-definite matrix, the greatest first."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _tail(values: torch.Tensor) -> torch.Tensor:
    """What is lost with all from each rank on."""
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
