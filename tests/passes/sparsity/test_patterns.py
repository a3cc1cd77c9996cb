"""Masks obey their pattern exactly, keep what they should, and are bettered without leaving it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from regauge.passes.calibration.quadratic import Quadratic, refit
from regauge.passes.sparsity.column_updates import prune_by_columns
from regauge.passes.sparsity.patterns import Blocks, NofM, Pattern, TransposableNofM, Unstructured
from regauge.passes.sparsity.quick_swaps import exchange_with_fixed
from regauge.passes.sparsity.refinement import swap_by_means
from regauge.passes.sparsity.swaps import exchange

PATTERNS = [
    NofM(2, 4), NofM(1, 4), NofM(4, 8), NofM(7, 16), TransposableNofM(2, 4), TransposableNofM(3, 8), Unstructured(),
    Unstructured(per_row=True), Blocks(4, 4), Blocks(2, 8),
]  # fmt: skip


def problem(outputs: int, columns: int, seed: int = 0) -> Quadratic:
    """Correlated inputs, as layers have them."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    hessian = x.t() @ x
    hessian += 1e-2 * hessian.diag().mean() * torch.eye(columns, dtype=torch.float64)
    weight = torch.randn(outputs, columns, generator=draw, dtype=torch.float64)
    return Quadratic(hessian, weight, torch.zeros(columns).double(), torch.zeros(outputs).double())


def ones(outputs: int) -> torch.Tensor:
    return torch.ones(outputs, dtype=torch.float64)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@given(rows=st.integers(1, 3), columns=st.integers(1, 5), seed=st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_masks_have_the_pattern_and_updated_weights_the_mask(
    pattern: Pattern, rows: int, columns: int, seed: int
) -> None:
    size = getattr(pattern, "of", 8)
    found = problem(size * rows, size * columns, seed)
    by_size = pattern.mask(found.optimum.abs(), 0.5)
    by_cost, weight = prune_by_columns(found, pattern, 0.5, ones(size * rows))
    fitted = refit(found, by_cost, weight)
    for kept in (by_size, by_cost):
        assert pattern.holds(kept)
        wanted = pattern.keep / pattern.of if isinstance(pattern, NofM) else 0.5
        if not isinstance(pattern, TransposableNofM):
            assert abs(float(kept.double().mean()) - wanted) <= 1.5 / min(kept.shape)
    assert bool(((weight == 0) | by_cost).all()) and bool(((fitted == 0) | by_cost).all())
    assert float(found.losses(fitted).sum()) <= float(found.losses(weight).sum()) * (1 + 1e-6)


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(4, 8), Unstructured()], ids=str)
def test_exchanged_masks_keep_the_pattern_and_lose_less_than_half_of_magnitude(pattern: Pattern) -> None:
    found = problem(24, 64)
    kept, weight = prune_by_columns(found, pattern, 0.5, ones(24))
    group = pattern.of if isinstance(pattern, NofM) else 64
    better, fitted = exchange(found, kept, group, 100)
    assert pattern.holds(better) and bool((better.sum(1) == kept.sum(1)).all())
    torch.testing.assert_close(fitted, refit(found, better, fitted), rtol=1e-5, atol=1e-7)
    loss = [float(found.losses(w).sum()) for w in (fitted, refit(found, kept, weight), weight)]
    assert loss[0] < 0.8 * loss[1] < loss[1] < loss[2]
    by_size = pattern.mask(found.optimum.abs(), 0.5)
    assert loss[0] < 0.6 * float(found.losses(refit(found, by_size, found.optimum)).sum())


def test_tables_of_exchanges_are_made_of_the_kept_and_the_removed_part_alone() -> None:
    found = problem(24, 64)
    kept, _ = prune_by_columns(found, NofM(2, 4), 0.5, ones(24))
    with FlopCounterMode(display=False) as counter:
        exchange(found, kept, 4, 0)
    assert counter.get_total_flops() < 24 * 64**3  # in products alone it was four times as much, on tables of all rows


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(4, 8), Unstructured()], ids=str)
def test_exchanges_with_the_other_weights_fixed_lower_the_error_too(pattern: Pattern) -> None:
    found = problem(24, 64)
    kept, weight = prune_by_columns(found, pattern, 0.5, ones(24))
    group = pattern.of if isinstance(pattern, NofM) else 64
    better, fitted = exchange_with_fixed(found, kept, weight, group, 100)
    assert pattern.holds(better) and bool((better.sum(1) == kept.sum(1)).all())
    assert bool((found.losses(fitted) <= found.losses(refit(found, kept, weight)) * (1 + 1e-6)).all())
    assert float(found.losses(fitted).sum()) < 0.9 * float(found.losses(refit(found, kept, weight)).sum())


def test_an_exchange_finds_the_best_mask_of_a_single_group() -> None:
    found = problem(16, 4)
    masks = [torch.tensor([[i in kept for i in range(4)]] * 16) for kept in itertools.combinations(range(4), 2)]
    best = torch.stack([found.losses(refit(found, kept, found.optimum)) for kept in masks]).amin(0)
    by_columns, _ = prune_by_columns(found, NofM(2, 4), 0.5, ones(16))
    torch.testing.assert_close(found.losses(refit(found, by_columns, found.optimum)), best)
    start = torch.tensor([[True, True, False, False]] * 16)
    _, weight = exchange(found, start, 4, 10)
    assert float((found.losses(weight) / best).max()) < 1.5  # a local optimum


def test_transposable_masks_of_four_are_the_best() -> None:
    costs = torch.rand(12, 8, generator=torch.Generator().manual_seed(0)).double()
    kept = TransposableNofM(2, 4).mask(costs, 0)
    assert bool((kept.reshape(12, 2, 4).sum(2) == 2).all()) and bool((kept.reshape(3, 4, 8).sum(1) == 2).all())
    rows = [torch.tensor([i in pair for i in range(4)]) for pair in itertools.combinations(range(4), 2)]
    block = costs[:4, :4]
    sums = [
        float((block * mask).sum())
        for chosen in itertools.product(rows, repeat=4)
        if bool(((mask := torch.stack(chosen)).sum(0) == 2).all())
    ]
    assert float(block[kept[:4, :4]].sum()) == pytest.approx(max(sums))


@given(seed=st.integers(0, 20))
@settings(max_examples=10, deadline=None)
def test_greater_transposable_masks_keep_nearly_what_rows_alone_would(seed: int) -> None:
    costs = torch.rand(16, 16, generator=torch.Generator().manual_seed(seed)).double()
    kept = TransposableNofM(4, 8).mask(costs, 0)
    assert bool((kept.reshape(16, 2, 8).sum(2) == 4).all()) and bool((kept.reshape(2, 8, 16).sum(1) == 4).all())
    assert float(costs[kept].sum()) > 0.9 * float(costs[NofM(4, 8).mask(costs, 0)].sum())


def test_means_swap_until_the_mean_of_the_output_is_kept() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, mean = torch.randn(20, 32, generator=draw).double(), torch.randn(32, generator=draw).double()
    second = mean.square() + torch.rand(32, generator=draw).double()
    for group, start in ((32, Unstructured(per_row=True)), (4, NofM(2, 4))):
        kept = start.mask(weight.abs(), 0.5)
        better = swap_by_means(weight, kept, mean, second, group)
        assert bool((better.reshape(20, -1, group).sum(2) == kept.reshape(20, -1, group).sum(2)).all())
        before, after = ((weight * mean * ~mask).sum(1).abs() for mask in (kept, better))
        assert bool((after <= before + 1e-12).all()) and float(after.sum()) < 0.5 * float(before.sum())


def test_of_equal_entries_in_a_group_the_first_stay() -> None:
    kept = NofM(2, 4).mask(torch.tensor([[1.0, 1, 1, 1, 0, 2, 0, 0]]), 0.5)
    assert kept.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
