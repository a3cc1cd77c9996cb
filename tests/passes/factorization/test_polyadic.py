"""Kernels as sums of terms by alternating least squares: sums are found again, and bounded where none is best."""

from __future__ import annotations

import pytest
import torch

from layer_kinds import drawn, metric
from regauge.frontends.capture import capture
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.factorization.polyadic import decomposed, in_turns, random_start, terms
from regauge.passes.factorization.problems import Problem
from regauge.passes.factorization.tensor_convs import Cp

SIZES = (12, 3, 3)


def of_terms(rank: int, noise: float) -> torch.Tensor:
    """A kernel [16, 12 x 3 x 3], each row of the terms around one direction, so that they are alike."""
    *rows, up = random_start(rank, SIZES, 16, seed=1)
    kernel = up @ terms([row + 1 for row in rows])
    return kernel + noise * kernel.norm() * drawn(*kernel.shape) / kernel.numel() ** 0.5


def share(kernel: torch.Tensor, found: torch.Tensor) -> float:
    return float((kernel - found).square().sum() / kernel.square().sum())


def layer() -> Layer:
    graph = capture(torch.nn.Conv2d(12, 16, 3, padding=1).double().eval(), (drawn(2, 12, 6, 6),))
    (found,) = [own for node in graph.nodes if (own := layer_of(node)) is not None]
    return found


def test_cp_comes_near_to_a_kernel_that_is_a_sum_of_as_many_terms() -> None:
    kernel = of_terms(10, noise=0.01)
    _, found = Cp().links(Problem(layer(), kernel), (10,))
    assert share(kernel, found) < 2e-4


def test_on_data_cp_begins_where_the_kernel_alone_leads() -> None:
    """From the terms that hold most of the kernel it came to 0.019 of all that there is to lose."""
    kernel = of_terms(10, noise=0.01)
    problem = Problem(layer(), kernel, metric(108), metric(16, 2))
    _, found = Cp().links(problem, (10,))
    assert problem.error(found) < 1e-3 * problem.error(torch.zeros_like(kernel))


def test_errors_are_told_and_only_fall() -> None:
    kernel = of_terms(10, noise=0.1)
    factors, errors = random_start(8, SIZES, 16, seed=0), list[float]()
    for _ in range(30):
        factors, error = in_turns(kernel, factors, 1)
        errors.append(error)
        assert error == pytest.approx(float((kernel - factors[-1] @ terms(factors[:-1])).square().sum()), rel=1e-6)
    assert all(later < before for before, later in zip(errors, errors[1:], strict=False))


def test_the_best_of_several_starts_goes_on() -> None:
    kernel = of_terms(10, noise=0.1)
    starts = [random_start(8, SIZES, 16, seed=seed) for seed in range(3)]
    found = [share(kernel, own[-1] @ terms(own[:-1])) for own in (decomposed(kernel, [start]) for start in starts)]
    best = decomposed(kernel, starts)
    assert share(kernel, best[-1] @ terms(best[:-1])) <= sorted(found)[1]


def test_terms_that_nearly_cancel_each_other_stay_bounded() -> None:
    """x x y + x y x + y x x is no sum of two terms, but as near to one as one likes, with terms as great as one likes
    (De Silva and Lim 2008, Tensor Rank and the Ill-Posedness of the Best Low-Rank Approximation Problem)."""
    x, y = torch.eye(2, dtype=torch.float64)
    pairs = ((x, x, y), (x, y, x), (y, x, x))
    kernel = sum(torch.einsum("i,j,k->ijk", *pair) for pair in pairs)
    assert isinstance(kernel, torch.Tensor)
    *_, up = decomposed(kernel.reshape(2, 4), [random_start(2, (2, 2), 2, seed=0)])
    assert float(up.norm(dim=0).max()) < 2.6
