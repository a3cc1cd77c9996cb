"""Amounts, counts and the allocator on its own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regauge.ir.dims.extents import Dim
from regauge.ir.errors import PassError
from regauge.passes.allocation.amounts import Amount, parse_amount
from regauge.passes.allocation.choices import Choice
from regauge.passes.allocation.plans import ranked_plan, uniform_plan
from regauge.passes.catalog import as_passes


@pytest.mark.parametrize(
    ("given_amount", "expected"),
    [
        (0.5, Amount(0.5, True)),
        (1, Amount(1, True)),
        (1200, Amount(1200, False)),
        ("1.2M", Amount(1.2e6, False)),
        ("300k", Amount(3e5, False)),
        ("5MB", Amount(5e6, False)),
        ("2MiB", Amount(2 * 2**20, False)),
        ("100B", Amount(100, False)),
        ("0.5", Amount(0.5, True)),
        ("1200", Amount(1200, False)),
    ],
)
def test_amounts(given_amount: float | str, expected: Amount) -> None:
    assert parse_amount(given_amount, "bytes") == expected


@pytest.mark.parametrize("wrong", ["0", "M", "5 apples", "-3M", 0, -1, 1.5, "1.5", float("nan"), float("inf")])
def test_wrong_amounts(wrong: float | str) -> None:
    with pytest.raises(PassError, match="bytes="):
        parse_amount(wrong, "bytes")


CHOICES = st.builds(
    lambda size, floor, multiple: Choice(
        Dim(size), np.random.default_rng(size).random(size), min(floor, size), multiple
    ),
    st.integers(2, 70),
    st.integers(1, 20),
    st.sampled_from([1, 2, 4, 8, 16]),
)


@given(CHOICES, st.floats(0, 100))
def test_counts_are_allowed_ones(choice: Choice, wanted: float) -> None:
    count = choice.rounded(wanted)
    assert 1 <= choice.least <= count <= choice.size
    assert count == choice.size or (count % choice.multiple == 0 and count >= choice.floor)
    assert choice.below(count) <= count <= choice.above(count) <= choice.size


@given(st.lists(CHOICES, min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1))
def test_counts_fall_as_the_level_rises(choices: list[Choice], a: float, b: float) -> None:
    low, high = sorted((a, b))
    for plan in (uniform_plan(choices), ranked_plan(choices)):
        assert all(plan(low)[choice.dim] >= plan(high)[choice.dim] for choice in choices)
        assert all(count == choice.size for choice, count in zip(choices, plan(0).values(), strict=True))


@pytest.mark.parametrize(
    ("given_amount", "expected"),
    [("5ms", 5.0), ("800us", 0.8), ("0.02s", 20.0), ("1500 ns", 1.5e-3), ("2.5MS", 2.5)],
)
def test_times(given_amount: str, expected: float) -> None:
    found = parse_amount(given_amount, "latency", "time")
    assert found.value == pytest.approx(expected) and not found.relative
    assert parse_amount("0.6", "latency", "time") == Amount(0.6, True)


@pytest.mark.parametrize("wrong", ["5", "5MB", "5 apples", "0ms", 3])
def test_wrong_times(wrong: float | str) -> None:
    with pytest.raises(PassError, match="latency="):
        parse_amount(wrong, "latency", "time")


def test_amounts_in_a_pipeline_text() -> None:
    (one,) = as_passes("prune{macs=300M,bytes=5MB,latency=5ms,peak=0.5}")
    assert (one.macs, one.bytes, one.latency, one.peak) == ("300M", "5MB", "5ms", 0.5)  # type: ignore[attr-defined]
    assert str(one) == "prune{macs=300M,bytes=5MB,peak=0.5,latency=5ms}"
