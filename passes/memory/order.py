"""Another order of the same tasks in which less memory is alive."""

from __future__ import annotations

from collections.abc import Iterator

from regauge.passes.memory.schedule import Work, excess

MOST_MOVED = 400
"""Tasks of which single ones are moved, one after the other: each try costs a walk over all."""


SWEEPS = 4


def reordered(work: Work, budget: float) -> list[int]:
    """The best of a few orders: the one that is there, with tasks moved, and one that lets go of most at each step.

    The original order where none is better, or where sizes are only known once some tasks have run.
    """
    if work.tells_sizes:
        return work.original
    before = _needed(work)
    found = [work.original, _greedy(work, before)]
    if len(work.tasks) <= MOST_MOVED:
        found = [_moved(work, order, before, budget) for order in found]
    return min(found, key=lambda order: (excess(work.alive(order), budget), work.peak(order)))


def _needed(work: Work) -> list[set[int]]:
    """For each task those that have to run before it: what it reads, and of tasks that are not free the one before."""
    found, last = [], None
    for number, task in enumerate(work.tasks):
        needed = {work.writer[memory] for memory in task.reads if memory in work.writer}
        if not task.free:
            needed |= {last} if last is not None else set()
            last = number
        found.append(needed)
    return found


def _greedy(work: Work, before: list[set[int]]) -> list[int]:
    """Of the tasks that can run always the one after which least is alive, the earliest of several."""
    readers = [0] * len(work.bytes)
    for task in work.tasks:
        for memory in task.reads:
            readers[memory] += 1
    for memory in work.kept:
        readers[memory] += 1
    open_ = [len(needed) for needed in before]
    after: list[list[int]] = [[] for _ in before]
    for number, needed in enumerate(before):
        for other in needed:
            after[other].append(number)
    ready, order = [number for number, count in enumerate(open_) if not count], list[int]()

    def grows(number: int) -> int:
        task = work.tasks[number]
        return sum(work.bytes[memory] for memory in task.writes if readers[memory]) - sum(
            work.bytes[memory] for memory in task.reads if readers[memory] == 1
        )

    while ready:
        number = min(ready, key=lambda number: (grows(number), number))
        ready.remove(number)
        order.append(number)
        for memory in work.tasks[number].reads:
            readers[memory] -= 1
        for other in after[number]:
            open_[other] -= 1
            if not open_[other]:
                ready.append(other)
    return order


def _moved(work: Work, order: list[int], before: list[set[int]], budget: float) -> list[int]:
    """The order with single tasks moved to just before their first reader or just behind what they read."""
    best = excess(work.alive(order), budget)
    for _ in range(SWEEPS):
        start = best
        for number in list(order):
            for place in _places(order, number, before):
                trial = [other for other in order if other != number]
                trial.insert(place, number)
                found = excess(work.alive(trial), budget)
                if found < best:
                    best, order = found, trial
                    break
        if best in (0, start):
            break
    return order


def _places(order: list[int], number: int, before: list[set[int]]) -> Iterator[int]:
    """The latest and the earliest place that a task may have in the order without it."""
    rest = [other for other in order if other != number]
    now = order.index(number)
    latest = next((place for place, other in enumerate(rest) if number in before[other]), len(rest))
    earliest = max((place + 1 for place, other in enumerate(rest) if other in before[number]), default=0)
    yield from (place for place in dict.fromkeys((latest, earliest)) if place != now)
