"""The knapsack against brute force, on tables of numbers and on graphs."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regauge.ir.dims.extents import Dim
from regauge.passes.allocation.amounts import Amount
from regauge.passes.allocation.budgets import Budget, Budgets, IndexCount
from regauge.passes.allocation.choices import Choice
from regauge.passes.allocation.knapsack import Curve, Knapsack, Table, options, score_curve
from regauge.passes.allocation.search import budgets_of
from small_graphs import residual_network

ITEMS = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 50)), min_size=1, max_size=4), min_size=1, max_size=4
)


def cheapest(items: list[list[tuple[int, int]]], budget: int) -> float:
    """The least loss by trying every combination."""
    fitting = [
        sum(loss for _, loss in chosen)
        for chosen in itertools.product(*items)
        if sum(cost for cost, _ in chosen) <= budget
    ]
    return min(fitting, default=float("inf"))


@given(ITEMS, st.integers(0, 40))
def test_the_table_is_what_brute_force_finds(items: list[list[tuple[int, int]]], budget: int) -> None:
    costs = [np.array([cost for cost, _ in item]) for item in items]
    losses = [np.array([loss for _, loss in item]) for item in items]
    table = Table(costs, losses, 40)
    expected = cheapest(items, budget)
    found = table.solution(budget)
    if found is None:
        assert expected == float("inf")
        return
    assert sum(item[option][1] for item, option in zip(items, found, strict=True)) == expected
    assert sum(item[option][0] for item, option in zip(items, found, strict=True)) <= budget


CURVES = st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=6), min_size=1, max_size=3)


@given(CURVES, st.floats(0.3, 1.0))
def test_losses_that_rise_anyhow_are_weighed_as_by_brute_force(steps: list[list[int]], share: float) -> None:
    """Costs are counts here, so that one linearisation is exact."""
    dims = [Dim(len(own)) for own in steps]
    choices = [Choice(dim, np.arange(float(len(own)))) for dim, own in zip(dims, steps, strict=True)]
    curves = {  # losses[k - 1] at k kept
        dim: Curve(np.arange(1, len(own) + 1), np.cumsum([0, *own[1:]])[::-1].astype(float))
        for dim, own in zip(dims, steps, strict=True)
    }
    sizes = {dim: int(dim.size) for dim in dims}
    target = max(share * sum(sizes.values()), len(dims))
    budgets = Budgets([Budget("indices", IndexCount(sizes), target)])
    knapsack = Knapsack(choices, curves, budgets)
    found = knapsack.solve()
    assert sum(found.values()) <= target
    every = itertools.product(*(range(1, int(dim.size) + 1) for dim in dims))
    best = min(knapsack.loss(dict(zip(dims, counts, strict=True))) for counts in every if sum(counts) <= target)
    assert knapsack.loss(found) == pytest.approx(best)


def test_options_are_allowed_counts_thinned_out() -> None:
    assert options(Choice(Dim(20), np.ones(20), floor=3, multiple=8)).tolist() == [8, 16, 20]
    many = options(Choice(Dim(1000), np.ones(1000), floor=10))
    assert len(many) == 32 and many[0] == 10 and many[-1] == 1000 and (np.diff(many) > 0).all()


def test_scores_that_add_up_are_a_curve() -> None:
    curve = score_curve(Choice(Dim(3), np.array([3.0, 1.0, 2.0])))
    assert [curve.loss(count) for count in range(4)] == [6, 3, 1, 0]


def small_choices(seed: int) -> tuple[object, list[Choice]]:
    graph = residual_network(6, 2)
    draws = np.random.default_rng(seed)
    dims = [group.dim for group in graph.groups() if group.free]
    return graph, [Choice(dim, draws.random(int(dim.size)) ** 4 * draws.uniform(0.1, 10)) for dim in dims]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("amounts", [{"macs": 0.5}, {"macs": 0.6, "params": 0.5}])
def test_products_of_counts_come_near_the_best_of_all_counts(seed: int, amounts: dict[str, float]) -> None:
    """MACs of a residual network: 6 x 12 x 12 counts, all tried."""
    graph, choices = small_choices(seed)
    budgets = Budgets(budgets_of(graph, {name: Amount(share, True) for name, share in amounts.items()}))  # type: ignore[arg-type]
    knapsack = Knapsack(choices, {choice.dim: score_curve(choice) for choice in choices}, budgets)
    found = knapsack.solve()
    assert budgets.set_sizes(found) <= 1
    best = float("inf")
    for counts in itertools.product(*(range(1, choice.size + 1) for choice in choices)):
        trial = dict(zip((choice.dim for choice in choices), counts, strict=True))
        if budgets.set_sizes(trial) <= 1:
            best = min(best, knapsack.loss(trial))
    assert knapsack.loss(found) <= 1.1 * best + 1e-9
