"""Moccasin's model of rematerialisation (Bartan et al., ICML 2023, section 2), solved by OR-Tools' CP-SAT.

Tasks have an order, which the run goes through in stages: in stage j tasks before the j-th may run again, and then the
j-th runs for the first time. So each start has a number of its own, and the variables are few: of each task up to two
*retention intervals*, from a start to the last read, the second of which may be absent.

    bytes of all intervals that overlap            <= budget            (cumulative)
    a start of a task lies in an interval of each  task that it reads   (one of two, chosen by a boolean)
    the first interval ends before the second starts

As there, a first phase minimises by how much the budget is exceeded, a second one the seconds that are spent again,
from what the first one found; ours starts near what the greedy search found. Bytes are divided by their greatest common
divisor. Unlike there, what is returned stays to the end, inputs are there from the start, and results of one task live
equally long.
"""

from __future__ import annotations

import math
from typing import Any

from regauge.ir.errors import PassError
from regauge.passes.memory.schedule import Schedule, Work

SHARE_OF_FIRST = 0.5
"""Of the time that is given, what the first phase may take."""

SECONDS = 1e9
"""Predicted seconds are counted in nanoseconds: CP-SAT takes whole numbers."""


def solved(work: Work, order: list[int], known: Schedule, budget: float, seconds: float) -> list[int] | None:
    """The schedule of this order with tasks that run twice that takes least time within the budget.

    The search starts near a schedule that is ``known``, of the same order. Where the budget is not met in so many
    seconds, the one that exceeds it least; None where none is found at all. Raises PassError without OR-Tools.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise PassError("solver=cp-sat needs OR-Tools: pip install 'regauge[opt]'") from error

    first = _Model(cp_model.CpModel(), work, order, budget)
    first.allow_excess()
    first.start_near(known)
    found = _solve(cp_model, first.model, seconds * SHARE_OF_FIRST, as_hinted=True)
    if found is None or found.objective_value > 0:
        found = _solve(cp_model, first.model, seconds * SHARE_OF_FIRST)
    if found is None:
        return None
    if found.objective_value > 0:
        return first.schedule(found)
    second = _Model(cp_model.CpModel(), work, order, budget)
    second.minimise_time()
    second.start_from(first, found)
    better = _solve(cp_model, second.model, seconds * (1 - SHARE_OF_FIRST))
    return first.schedule(found) if better is None else second.schedule(better)


def _solve(cp_model: Any, model: Any, seconds: float, *, as_hinted: bool = False) -> Any:
    """A solver that holds a solution; None where there is none, or none with the values that are hinted at."""
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.random_seed = 0
    solver.parameters.fix_variables_to_their_hinted_value = as_hinted
    status = solver.solve(model)
    return solver if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else None


class _Interval:
    """One retention interval of a task: ``runs`` is a boolean of the model, or True for the first one."""

    def __init__(self, task: int, start: Any, end: Any, runs: Any) -> None:
        self.task, self.start, self.end, self.runs = task, start, end, runs


class _Model:
    def __init__(self, model: Any, work: Work, order: list[int], budget: float) -> None:
        self.model, self.work, self.order = model, work, order
        self.count = len(order)
        self.end = _event(self.count, self.count) + 1  # what is returned is read then
        self.variables: list[Any] = []
        self.unit = math.gcd(*(size for size in work.bytes if size)) or 1
        self.capacity: Any = int(budget) // self.unit
        self.of: dict[int, list[_Interval]] = {}
        self.spans: list[tuple[Any, int]] = []  # intervals of the model, with the units of memory that each takes
        for place, number in enumerate(order, 1):
            self._add_task(place, number)
        self._read_inputs()
        for number in order:
            for interval in self.of[number]:
                for read in {work.writer[memory] for memory in work.tasks[number].reads if memory in work.writer}:
                    self._covered(self.of[read], interval.start, interval.runs)
        for read in {work.writer[memory] for memory in work.kept if memory in work.writer}:
            self._covered(self.of[read], self.end, True)
        self._limited()

    # -- variables ---------------------------------------------------------------------------------------------------

    def _new(self, variable: Any) -> Any:
        self.variables.append(variable)
        return variable

    def _add_task(self, place: int, number: int) -> None:
        model, task = self.model, self.work.tasks[number]
        start = _event(place, place)
        end = self._new(model.new_int_var(start, self.end, f"end{number}"))
        size = sum(self.work.bytes[memory] for memory in task.writes) // self.unit
        self.of[number] = [_Interval(number, start, end, True)]
        self.spans.append((model.new_interval_var(start, end - start + 1, end + 1, f"kept{number}"), size))
        extra = -(-task.inside // self.unit) - size
        if extra > 0:
            self.spans.append((model.new_fixed_size_interval_var(start, 1, f"inside{number}"), extra))
        if task.again and place < self.count:
            self._add_again(place, number, end, size)

    def _add_again(self, place: int, number: int, end: Any, size: int) -> None:
        from ortools.sat.python import cp_model

        model = self.model
        stages = cp_model.Domain.from_values([_event(stage, place) for stage in range(place + 1, self.count + 1)])
        start = self._new(model.new_int_var_from_domain(stages, f"again{number}"))
        last = self._new(model.new_int_var(0, self.end, f"last{number}"))
        runs = self._new(model.new_bool_var(f"runs{number}"))
        length = model.new_int_var(0, self.end, "")
        model.add(last >= start).only_enforce_if(runs)
        model.add(end < start).only_enforce_if(runs)
        self.spans.append((model.new_optional_interval_var(start, length, last + 1, runs, f"kept_again{number}"), size))
        self.of[number].append(_Interval(number, start, last, runs))

    # -- constraints -------------------------------------------------------------------------------------------------

    def _covered(self, intervals: list[_Interval], step: Any, runs: Any) -> None:
        """One of a task's intervals holds its result at a step, where what happens at that step does happen."""
        model, chosen = self.model, []
        for interval in intervals:
            holds = self._new(model.new_bool_var(""))
            model.add(interval.start < step).only_enforce_if(holds)
            model.add(interval.end >= step).only_enforce_if(holds)
            if interval.runs is not True:
                model.add_implication(holds, interval.runs)
            chosen.append(holds)
        if runs is True:
            model.add_bool_or(chosen)
        else:
            model.add_bool_or([*chosen, runs.negated()])

    def _read_inputs(self) -> None:
        """Inputs stay from the start to the last task that reads them."""
        for memory in self.work.given:
            end = self._new(self.model.new_int_var(0, self.end, ""))
            span = self.model.new_interval_var(0, end + 1, end + 1, "")
            self.spans.append((span, self.work.bytes[memory] // self.unit))
            if memory in self.work.kept:
                self.model.add(end == self.end)
            for number in self.order:
                for interval in self.of[number] if memory in self.work.tasks[number].reads else ():
                    reads = self.model.add(end >= interval.start)
                    if interval.runs is not True:
                        reads.only_enforce_if(interval.runs)

    def _limited(self) -> None:
        self.excess = self._new(self.model.new_int_var(0, sum(size for _, size in self.spans), "excess"))
        spans, sizes = zip(*self.spans, strict=True)
        self.model.add_cumulative(spans, sizes, self.capacity + self.excess)

    # -- goals -------------------------------------------------------------------------------------------------------

    def allow_excess(self) -> None:
        self.model.minimize(self.excess)

    def minimise_time(self) -> None:
        self.model.add(self.excess == 0)
        again = [interval for intervals in self.of.values() for interval in intervals[1:]]
        times = [max(1, round(self.work.tasks[interval.task].seconds * SECONDS)) for interval in again]
        self.model.minimize(sum(time * interval.runs for time, interval in zip(times, again, strict=True)))

    def start_from(self, other: _Model, found: Any) -> None:
        for mine, its in zip(self.variables, other.variables, strict=True):
            self.model.add_hint(mine, found.value(its))

    def start_near(self, known: Schedule) -> None:
        """Hint at a schedule, as far as it runs tasks twice at most."""
        place = {number: at for at, number in enumerate(self.order, 1)}
        events, stage = [0] * (len(known) + 2), self.count
        first = {number: step for step, number in reversed(list(enumerate(known, 1)))}
        for step, number in reversed(list(enumerate(known, 1))):
            stage = place[number] if first[number] == step else stage
            events[step] = _event(stage, place[number])
        events[-1] = self.end
        ends: dict[int, int] = {}
        for _, steps in self.work.spans(known):
            ends[steps[0]] = max(ends.get(steps[0], 0), steps[-1])
        for number, intervals in self.of.items():
            runs = [step for step, other in enumerate(known, 1) if other == number]
            for interval, step in zip(intervals, runs, strict=False):
                self.model.add_hint(interval.end, events[ends.get(step, step)])
                if interval.runs is not True:
                    self.model.add_hint(interval.start, events[step])
            for interval in intervals[1:]:
                self.model.add_hint(interval.runs, len(runs) > 1)

    def schedule(self, found: Any) -> list[int]:
        """The tasks in the order of their starts."""
        starts = [
            (found.value(interval.start), interval.task)
            for intervals in self.of.values()
            for interval in intervals
            if interval.runs is True or found.value(interval.runs)
        ]
        return [task for _, task in sorted(starts)]


def _event(stage: int, place: int) -> int:
    """The number of the start in a stage of the task at a place of the order, both counted from 1."""
    return stage * (stage - 1) // 2 + place
