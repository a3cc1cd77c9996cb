"""Chooses what a run computes again to keep within a memory budget, greedily by bytes freed for seconds spent."""

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
    alive = work.alive(order)
    best, least, most = order, max(alive), 10 * len(order)
    for _ in range(most):
        if max(alive) <= budget:
            return _thinned(work, order, budget)
        now = excess(alive, budget)
        tried: list[tuple[float, list[int]]] = []
        offers = sorted(_Search(work, order, alive, budget).offers(), key=lambda offer: -offer.gain)
        for offer in offers[:TRIED]:
            trial = [*order[: offer.step - 1], *offer.tasks, *order[offer.step - 1 :]]
            saved = now - excess(work.alive(trial), budget)
            if saved > 0:
                tried.append((saved / _seconds(work, offer.tasks), trial))
        if not tried:
            break
        order = max(tried, key=lambda entry: entry[0])[1]
        alive = work.alive(order)
        if max(alive) < least:
            best, least = order, max(alive)
    return best


class _Search:
    """What may be let go of in a schedule between two of its reads, with steps above the budget between them."""

    def __init__(self, work: Work, order: list[int], alive: list[int], budget: float) -> None:
        self.work, self.order = work, order
        self.spans: dict[int, list[list[int]]] = {}
        for memory, steps in work.spans(order):
            self.spans.setdefault(memory, []).append(steps)
        self.above = [0]
        for bytes_ in alive:
            self.above.append(self.above[-1] + (bytes_ > budget))

    def offers(self) -> Iterator[_Again]:
        for memory, spans in self.spans.items():
            writer = self.work.writer.get(memory)
            if writer is None or not self.work.tasks[writer].again:
                continue
            for first, second in (pair for steps in spans for pair in pairwise(steps)):
                freed = self._over(memory, first, second)
                if not freed:
                    continue
                for tasks in self._chains(writer, second):
                    gain = (freed - self._kept_longer(tasks, second)) / _seconds(self.work, tasks)
                    if gain > 0:
                        yield _Again(tasks, second, gain)

    def _over(self, memory: int, first: int, second: int) -> int:
        """Bytes of a memory, once for each step above the budget that lies between two steps."""
        return self.work.bytes[memory] * (self.above[second] - self.above[first + 1])

    def _last(self, memory: int, step: int) -> int:
        """The step up to which what a memory holds at ``step`` is alive now."""
        return max((steps for steps in self.spans[memory] if steps[0] < step), key=lambda steps: steps[0])[-1]

    def _kept_longer(self, tasks: tuple[int, ...], step: int) -> int:
        """What tasks read, and none of them gives, has to be kept for them."""
        given = {memory for number in tasks for memory in self.work.tasks[number].writes}
        read = {memory for number in tasks for memory in self.work.tasks[number].reads} - given
        lasts = {memory: self._last(memory, step) for memory in read}
        return sum(self._over(memory, last, step) for memory, last in lasts.items() if last < step)

    def _chains(self, writer: int, step: int) -> Iterator[tuple[int, ...]]:
        """The task alone, and with more and more of those that give what it reads, where that is gone by the step."""
        chain, last = {writer}, {writer}
        for _ in range(DEEPEST):
            yield tuple(sorted(chain))
            read = {memory for number in last for memory in self.work.tasks[number].reads}
            gone = [memory for memory in read if self._last(memory, step) < step]
            last = {self.work.writer[memory] for memory in gone if memory in self.work.writer} - chain
            if not last or not all(self.work.tasks[number].again for number in last):
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
