"""Moments of layers: what is summed over rows, and how exactly."""

import pytest
import torch

from regauge.passes.calibration.moments import Moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_over_rows_are_those_of_the_rows(dtype: torch.dtype) -> None:
    x, y = torch.randn(300, 7).to(dtype), torch.randn(300, 3).to(dtype) + 2
    found = Moments(7, 3)
    found.add(x[:100], y[:100])
    found.add(x[100:], y[100:])
    ones = torch.cat([x.double(), torch.ones(300, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(found.gram, ones.t() @ ones, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(found.cross, y.double().t() @ ones, rtol=1e-6, atol=1e-4)


def test_inputs_that_hardly_vary_have_exact_centred_moments() -> None:
    x = 20 + 1e-3 * torch.randn(1000, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x @ torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = Moments(16, 4)
    found.add(x[:500], y[:500])
    found.add(x[500:], y[500:])
    off, wanted = x - x.mean(0), y - y.mean(0)
    torch.testing.assert_close(found.centred(), off.t() @ off, rtol=1e-4, atol=1e-7)
    cross = found.cross[:, :-1] - torch.outer(y.mean(0), found.gram[-1, :-1])
    torch.testing.assert_close(cross, wanted.t() @ off, rtol=1e-4, atol=1e-6)
    assert float(torch.linalg.eigvalsh(found.centred()).min()) > 5e-4  # it was -0.02, indefinite
