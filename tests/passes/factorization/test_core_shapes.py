"""Ranks of both sides of a Tucker decomposition: none that is left out would have kept more at its cost."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from regauge.frontends.capture import capture
from regauge.passes.calibration.layers import layer_of, matrices_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.core_shapes import core_shapes
from regauge.passes.factorization.problems import Problem, plain_problems


def tail(*values: float) -> torch.Tensor:
    return torch.tensor([*np.cumsum(values[::-1])[::-1], 0.0])


def test_every_budget_has_the_pair_that_keeps_most() -> None:
    """Against all pairs, for every budget: the exact solution of the problem of core shapes."""
    tails = tail(9, 4, 3, 2, 1, 0.5), tail(20, 1, 0.7, 0.2)
    first, second = [1, 2, 3, 4, 5], [1, 2, 3]
    p, q = np.array(first)[:, None], np.array(second)[None]
    cost = 6 * p + 9 * p * q + 4 * q
    found = core_shapes(first, second, tails, [cost])
    every = [(a, b) for a in first for b in second]
    assert len(found) < len(every)

    def least(pairs: list[tuple[int, int]], budget: int) -> float:
        fitting = [pair for pair in pairs if 6 * pair[0] + 9 * pair[0] * pair[1] + 4 * pair[1] <= budget]
        return min(float(tails[0][a] + tails[1][b]) for a, b in fitting)

    for budget in range(int(cost.min()), int(cost.max()) + 1):
        assert least(found, budget) == least(every, budget)


def test_kernels_of_unequal_sides_get_unequal_ranks() -> None:
    """Inputs of two directions, outputs of all: equal ranks would keep less at the same size."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 16, 3, padding=1, bias=False).double()
    directions = torch.randn(16, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("opab,ip->oiab", torch.randn(16, 2, 3, 3).double(), directions))
    graph = capture(layer, (torch.zeros(1, 16, 6, 6).double(),))
    (own,) = [found for node in graph.nodes if (found := layer_of(node)) is not None]
    choices = FORMS["tucker"].choices(plain_problems(own)[0], graph, 1)
    within = [choice for choice in choices if choice.parameters <= 0.25 * own.weight.tensor.numel()]
    best = min(within, key=lambda choice: choice.loss)
    assert best.ranks[0] == 2 and best.ranks[1] >= 12
    assert best.loss < 0.1


def test_one_side_alone_keeps_what_inputs_span() -> None:
    """Tucker-1 on inputs is exact at the rank of the inputs' unfolding, low-rank (on outputs) is not."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, bias=False).double()
    with torch.no_grad():
        core, directions = torch.randn(12, 3, 3, 3).double(), torch.randn(8, 3).double()
        layer.weight.copy_(torch.einsum("opab,ip->oiab", core, directions))
    graph = capture(layer, (torch.zeros(1, 8, 6, 6).double(),))
    (own,) = [found for node in graph.nodes if (found := layer_of(node)) is not None]
    problem = Problem(own, matrices_of(own)[0])
    links, matrix = FORMS["tucker-1"].links(problem, (3,))
    assert [tuple(link.weight.shape) for link in links] == [(3, 8, 1, 1), (12, 3, 3, 3)]
    assert problem.error(matrix) < 1e-20
    assert problem.error(FORMS["low-rank"].links(problem, (3,))[1]) > 0.3
