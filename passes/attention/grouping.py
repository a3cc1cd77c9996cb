"""Partitions heads into groups that share one: as even as can be, with the least loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations

Group = tuple[int, ...]

_MOST_PARTITIONS = 2000
_MOST_ROUNDS = 50


def neighbours(count: int, groups: int) -> list[Group]:
    """Consecutive heads in groups as even as can be."""
    bounds = [-(-count * place // groups) for place in range(groups + 1)]
    return [tuple(range(start, end)) for start, end in zip(bounds, bounds[1:], strict=False)]


def best_partition(count: int, groups: int, loss: Callable[[Group], float]) -> list[Group]:
    """Groups of ``count`` heads, the sum of whose losses is least; each sorted, in the order of their first heads.

    All partitions are tried where they are few; else pairs of heads are exchanged, from neighbours on, as long as that
    helps. ``loss`` is asked once about a group.
    """
    loss = cache(loss)
    start = neighbours(count, groups)
    if partitions(count, groups) <= _MOST_PARTITIONS:
        found = min(_all(tuple(range(count)), tuple(sorted(map(len, start)))), key=lambda p: sum(map(loss, p)))
    else:
        found = _exchanged(start, loss)
    return sorted(found)


def partitions(count: int, groups: int) -> int:
    """How many partitions into groups as even as can be there are."""
    sizes = [len(group) for group in neighbours(count, groups)]
    ways = math.factorial(count)
    for size in sizes:
        ways //= math.factorial(size)
    for size in set(sizes):
        ways //= math.factorial(sizes.count(size))
    return ways


def _all(heads: Group, sizes: tuple[int, ...]) -> Iterator[list[Group]]:
    """Every partition of heads into groups of these sizes, once: the first head is in a group of each size in turn."""
    if not heads:
        yield []
        return
    first, rest = heads[0], heads[1:]
    for size in sorted(set(sizes)):
        left = list(sizes)
        left.remove(size)
        for others in combinations(rest, size - 1):
            remaining = tuple(head for head in rest if head not in others)
            for found in _all(remaining, tuple(left)):
                yield [(first, *others), *found]


def _exchanged(groups: list[Group], loss: Callable[[Group], float]) -> list[Group]:
    found = list(groups)
    for _ in range(_MOST_ROUNDS):
        changed = False
        for a, b in combinations(range(len(found)), 2):
            pairs = [(one, other) for one in found[a] for other in found[b]]
            options = [_exchange(found[a], found[b], *pair) for pair in pairs]
            best = min(options, key=lambda option: loss(option[0]) + loss(option[1]))
            if loss(best[0]) + loss(best[1]) < loss(found[a]) + loss(found[b]):
                found[a], found[b] = best
                changed = True
        if not changed:
            break
    return found


def _exchange(first: Group, second: Group, one: int, other: int) -> tuple[Group, Group]:
    return (
        tuple(sorted([*(head for head in first if head != one), other])),
        tuple(sorted([*(head for head in second if head != other), one])),
    )
