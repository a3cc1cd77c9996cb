"""Partitions of heads: all where they are few, exchanges where they are many."""

import math

import pytest

from regauge.passes.attention.grouping import best_partition, neighbours, partitions


@pytest.mark.parametrize(("count", "groups", "expected"), [(6, 3, 15), (6, 2, 10), (6, 4, 45), (8, 2, 35), (5, 2, 10)])
def test_every_partition_counts_once(count: int, groups: int, expected: int) -> None:
    asked: set[tuple[int, ...]] = set()

    def loss(group: tuple[int, ...]) -> float:
        asked.add(group)
        return float(len(group))

    assert partitions(count, groups) == expected
    assert sorted(head for group in best_partition(count, groups, loss) for head in group) == list(range(count))
    sizes = {len(group) for group in neighbours(count, groups)}
    assert len(asked) == sum(math.comb(count, size) for size in sizes)  # every group that is large enough was looked at


@pytest.mark.parametrize(("count", "groups"), [(6, 3), (16, 4)])
def test_heads_that_belong_together_are_found(count: int, groups: int) -> None:
    wanted = [tuple(range(first, count, groups)) for first in range(groups)]  # every so many-th, no neighbours

    def loss(group: tuple[int, ...]) -> float:
        return float(sum(a % groups != b % groups for a in group for b in group))

    assert best_partition(count, groups, loss) == wanted


def test_groups_are_as_even_as_can_be() -> None:
    assert neighbours(6, 4) == [(0, 1), (2,), (3, 4), (5,)]
    assert neighbours(8, 2) == [(0, 1, 2, 3), (4, 5, 6, 7)]
