"""What to compute again so that a run keeps within a budget of memory, greedily by bytes freed for seconds spent."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from regauge.passes.memory.schedule import Work, excess

TRIED = 24
"""Recomputations that are tried out at each step, those first that promise most."""

DEEPEST = 8
"""How far back tasks are computed again where what they read is gone, too."""


class _Again(NamedTuple):
    """Tasks to run once more before a step, and the bytes that this frees for each second that it takes."""

    tasks: tuple[int, ...]
    step: int
    gain: float


def recomputed(work: Work, order: list[int], budget: float) -> list[int]:
    """The schedule with tasks that run again just before what reads them later, until the peak is within the budget.

    Where that cannot be reached, the schedule with the least peak that was seen.
    """
    spans = work.spans(order)
    alive = work.alive(order, spans)
    best, least, most = order, max(alive), 10 * len(order)
    for _ in range(most):
        if max(alive) <= budget:
            return _thinned(work, order, budget)
        now = excess(alive, budget)
        tried: list[tuple[float, list[int]]] = []
        offers = sorted(_offers(work, order, spans, alive, budget), key=lambda offer: -offer.gain)
        for offer in offers[:TRIED]:
            trial = [*order[: offer.step - 1], *offer.tasks, *order[offer.step - 1 :]]
            saved = now - excess(work.alive(trial), budget)
            if saved > 0:
                tried.append((saved / _seconds(work, offer.tasks), trial))
        if not tried:
            break
        order = max(tried, key=lambda entry: entry[0])[1]
        spans = work.spans(order)
        alive = work.alive(order, spans)
        if max(alive) < least:
            best, least = order, max(alive)
    return best


def _offers(
    work: Work, order: list[int], spans: list[tuple[int, list[int]]], alive: list[int], budget: float
) -> Iterator[_Again]:
    """What may be let go of between two of its reads, with steps above the budget between them."""
    above = [0]
    for bytes_ in alive:
        above.append(above[-1] + (bytes_ > budget))
    for memory, steps in spans:
        writer = work.writer.get(memory)
        if writer is None or not work.tasks[writer].again or not work.bytes[memory]:
            continue
        for first, second in pairwise(steps):
            over = above[second] - above[first + 1]
            if over:
                for tasks in _chains(work, order, spans, writer, second):
                    yield _Again(tasks, second, over * work.bytes[memory] / _seconds(work, tasks))


def _chains(
    work: Work, order: list[int], spans: list[tuple[int, list[int]]], writer: int, step: int
) -> Iterator[tuple[int, ...]]:
    """The task alone, and with more and more of those that give what it reads, where that is gone by then."""
    there = {memory for memory, steps in spans if steps[0] < step <= steps[-1]}
    chain, last = {writer}, {writer}
    for _ in range(DEEPEST):
        yield tuple(sorted(chain))
        gone = {memory for number in last for memory in work.tasks[number].reads} - there
        last = {work.writer[memory] for memory in gone if memory in work.writer} - chain
        if not last or not all(work.tasks[number].again for number in last):
            return
        chain |= last


def _seconds(work: Work, tasks: tuple[int, ...]) -> float:
    return max(sum(work.tasks[number].seconds for number in tasks), 1e-12)


def _thinned(work: Work, order: list[int], budget: float) -> list[int]:
    """The schedule without what runs again for nothing, since what came after it did more; the last ones first."""
    for step in reversed(range(len(order))):
        if order[step] in order[:step]:
            trial = order[:step] + order[step + 1 :]
            if work.peak(trial) <= budget:
                order = trial
    return order
