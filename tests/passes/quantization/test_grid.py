from typing import Any

import pytest
import torch

from regauge.passes.quantization.grid import Form, Grid
from regauge.passes.quantization.ranges import Histogram, ends_of


@pytest.mark.parametrize(
    ("grid", "low", "high", "dtype"),
    [
        (Grid(8), -128, 127, torch.int8),
        (Grid(8, symmetric=False), 0, 255, torch.uint8),
        (Grid(3), -4, 3, torch.int8),
        (Grid(2, symmetric=False), 0, 3, torch.uint8),
        (Grid(16), -32768, 32767, torch.int16),
    ],
)
def test_grids_have_all_integers_of_their_bits(grid: Grid, low: int, high: int, dtype: torch.dtype) -> None:
    assert (grid.low, grid.high, grid.dtype) == (low, high, dtype)


def test_zero_stays_zero() -> None:
    """Padding and masked entries are zeros: a range that does not hold 0 is widened."""
    grid = Grid(8, symmetric=False)
    for low, high in ((0.3, 2.0), (-2.0, -0.3), (-1.0, 3.0), (0.0, 0.0)):
        scale, zero = grid.span(torch.tensor(low), torch.tensor(high))
        code = grid.codes(torch.tensor(0.0), scale, zero)
        assert float((code - zero) * scale) == 0 and float(scale) > 0


def test_groups_have_scales_of_their_own() -> None:
    weight = torch.randn(6, 64).double() * torch.tensor([1.0, 50.0]).double().repeat_interleave(32)
    whole, groups = Form(Grid(4), 64).rounded(weight), Form(Grid(4), 32).rounded(weight)
    assert groups.scale.shape == (6, 2) and whole.scale.shape == (6, 1)
    small = slice(0, 32)
    errors = [float((coded.values - weight)[:, small].square().sum()) for coded in (groups, whole)]
    assert errors[0] < 0.05 * errors[1]


def test_ends_that_clip_lose_less_than_the_whole_range() -> None:
    weight = torch.randn(8, 256).double()
    coded = Form(Grid(3), 256).rounded(weight)
    scale, zero = Grid(3).span(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True))
    plain = (Grid(3).codes(weight, scale, zero) - zero) * scale
    assert float((coded.values - weight).square().sum()) < 0.8 * float((plain - weight).square().sum())


def test_a_histogram_of_batches_is_that_of_all() -> None:
    """A batch that reaches further merges bins in pairs: no entry is lost, and ends are found where they were."""
    batches = [torch.randn(4000) * scale for scale in (0.5, 3.0, 1.0, 9.0)]
    found, whole = Histogram(), Histogram()
    for batch in batches:
        found.add(batch)
    whole.add(torch.cat(batches))
    assert float(found.counts.sum()) == 16000 and len(found.counts) == len(whole.counts)
    assert found.range == whole.range
    grid = Grid(8, symmetric=False)
    for way in ("minmax", "percentile", "mse", "entropy"):
        for a, b in zip(ends_of(found, grid, way), ends_of(whole, grid, way), strict=True):
            assert abs(a - b) < 0.03 * abs(b)


def test_outliers_are_clipped_where_that_loses_less() -> None:
    entries = torch.cat([torch.randn(100_000), torch.tensor([40.0])])
    histogram = Histogram()
    histogram.add(entries)
    grid = Grid(4, symmetric=False)

    def error(ends: tuple[float, float]) -> float:
        scale, zero = grid.span(*map(torch.tensor, ends))
        return float(((grid.codes(entries, scale, zero) - zero) * scale - entries).square().sum())

    whole, least = ends_of(histogram, grid, "minmax"), ends_of(histogram, grid, "mse")
    assert whole[1] == pytest.approx(40.0) and error(least) < 0.15 * error(whole)
    assert ends_of(histogram, grid, "percentile")[1] < 6 and ends_of(histogram, grid, "entropy")[1] < 20


def test_entries_count_by_the_importance_of_their_channel() -> None:
    """A channel that no layer weighs much may be clipped."""
    x = torch.randn(20_000, 2) * torch.tensor([1.0, 12.0])
    light, heavy = Histogram(-1, torch.tensor([1.0, 1e-6])), Histogram(-1, torch.tensor([1.0, 1.0]))
    for histogram in (light, heavy):
        histogram.add(x)
    grid = Grid(4, symmetric=False)
    assert ends_of(light, grid, "mse")[1] < 0.5 * ends_of(heavy, grid, "mse")[1]


@pytest.mark.parametrize("scales", ["searched", "least", "whole"])
def test_many_rows_are_rounded_in_parts_as_all_at_once(scales: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(37, 24), torch.rand(24)
    form = Form(Grid(4, symmetric=False), 12, scales, zeros=torch.rand(37, 24) < 0.3)
    whole = form.rounded(weight, importance)
    monkeypatch.setattr("regauge.passes.quantization.grid._AT_ONCE", 24 * 5)
    parts = form.rounded(weight, importance)
    for name in ("codes", "scale", "zero", "values"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
