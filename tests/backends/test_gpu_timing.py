"""Times on a GPU: what can be said of them without one."""

import pytest
import torch

from regauge.backends.gpu_timing import Spread, copies_for, rotating, times
from regauge.ir.errors import RegaugeError


def test_a_spread_is_the_median_and_the_tenths_around_it() -> None:
    spread = Spread.of([float(n) for n in range(1, 100)])
    assert (spread.p10, spread.median, spread.p90) == (10, 50, 90)
    assert Spread.of([2.0]) == Spread(2, 2, 2)


def test_data_rotates_through_more_than_four_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.zeros(1000, device="meta"), torch.zeros(250, device="meta")]  # 5000 bytes
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Card", (), {"L2_cache_size": 12_000}))
    assert copies_for(tensors) == 11 and len(rotating(tensors)) == 11  # 55000 bytes, 48000 are four caches


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_told() -> None:
    with pytest.raises(RegaugeError, match="times of kernels are measured on a GPU"):
        times([torch.relu], [[torch.zeros(2)]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_work_takes_longer() -> None:
    x, y = torch.randn(2**16, device="cuda"), torch.randn(2**26, device="cuda")
    (short,), (long,) = (times([torch.relu], rotating([tensor])) for tensor in (x, y))
    assert 10 * short.median < long.median and short.p10 <= short.median <= short.p90
