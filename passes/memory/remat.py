"""``remat``: the same results with less memory alive at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.allocation.amounts import parse_amount, shown
from regauge.passes.allocation.latency import device_of
from regauge.passes.base import Context, Contract, Pass
from regauge.passes.memory.cp_sat import solved
from regauge.passes.memory.greedy import recomputed
from regauge.passes.memory.order import reordered
from regauge.passes.memory.rewritten import scheduled
from regauge.passes.memory.schedule import Work
from regauge.passes.options import option

_AIMS = 8  # between the budget and what was reached, before the least is told


@dataclass(frozen=True, kw_only=True)
class Remat(Pass):
    """Keep the memory of a run within a budget: nodes run in another order, and some of them twice.

    before  a = relu(x)   b = ...a...   y = concat(b, a)
    after   a = relu(x)   b = ...a...   a' = relu(x)   y = concat(b, a')

    What is counted is what ``regauge memory`` shows: values alive at a time, views in the memory of what they show, no
    weights. First another order is tried; then values that are held over the peak are let go of, and computed
    again just before they are read, as long as that is needed, those first that free most bytes for the predicted time.
    ``solver=cp-sat`` states the second step as Moccasin does (Bartan et al., ICML 2023), for OR-Tools to solve: each
    value is computed twice at most, in the order found first, at the least predicted time; where it finds none, it is
    done greedily. What is random or has states is never computed twice, and keeps its order.

    Emitted torch code lets go of each value behind its last reader; what a module gets as an argument is held by its
    caller until it returns. ``simplify`` leaves what runs again alone, but runtimes may not: for onnxruntime disable
    CommonSubexpressionElimination. Let ``remat`` be the last pass: what others build is in no such order.
    Dynamic sizes are those of the first batch of data, or else their least.
    """

    name: ClassVar[str] = "remat"
    contract: ClassVar[Contract] = "exact"

    memory: float | str = option(help="bytes alive at most: a share of the present peak or a number (5MB)")
    solver: Literal["greedy", "cp-sat"] = option("greedy", "how it is decided what runs again: cp-sat needs ortools")
    seconds: float = option(30.0, "how long solver=cp-sat may search", above=0)
    device: str | Mapping[str, int | float] = option(
        "cpu", "whose time is predicted: cpu, gpu or {flops=5e10,bandwidth=1e10,overhead=2e-6,multiple=8}"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_amount(self.memory, "memory", "bytes")
        device_of(self.device)

    def call(self, graph: Graph, context: Context) -> Graph:
        work = Work(graph, device_of(self.device), context.sizes(graph))
        before = work.peak(work.original)
        budget = parse_amount(self.memory, "memory", "bytes").of(before)
        if before <= budget:
            context.note(f"the peak is {shown(before, 'bytes')}, within the budget")
            return graph
        order = self._schedule(work, budget, context)
        _tell(work, order, context)
        return scheduled(work, order, self.name)

    def _schedule(self, work: Work, budget: float, context: Context) -> list[int]:
        """The schedule within the budget that takes the least time; raises PassError where none is found."""
        moved = reordered(work, budget)
        orders = [moved] if moved == work.original else [moved, work.original]
        tried = [recomputed(work, order, budget) for order in orders]
        if self.solver == "cp-sat" and work.peak(moved) > budget:
            found = solved(work, moved, tried[0], budget, self.seconds)
            if found is not None and work.peak(found) <= budget:
                return found
            context.note("cp-sat found no schedule in the budget that runs nodes twice at most: decided greedily")
        within = [order for order in tried if work.peak(order) <= budget]
        if within:
            return min(within, key=work.seconds)
        least = min(_least(work, order, budget) for order in orders)
        raise PassError(
            f"memory: the least that was found is {shown(least, 'bytes')} at the peak, "
            f"not {shown(budget, 'bytes')} ({shown(work.peak(work.original), 'bytes')} before): "
            f"write memory={least} or more"
        )


def _least(work: Work, order: list[int], budget: float) -> int:
    """The least peak that is found by aiming at one between the budget and the best so far, a few times."""
    best, low = work.peak(order), budget
    for _ in range(_AIMS):
        found = work.peak(recomputed(work, order, (best + low) / 2))
        low = low if found <= (best + low) / 2 else (best + low) / 2
        best = min(best, found)
    return best


def _tell(work: Work, order: list[int], context: Context) -> None:
    before, after = (work.peak(schedule) for schedule in (work.original, order))
    first = list(dict.fromkeys(order))
    twice = Counter(work.tasks[number].node.op for number in order) - Counter(
        work.tasks[number].node.op for number in first
    )
    context.note(f"peak: {shown(before, 'bytes')} -> {shown(after, 'bytes')}")
    if first != work.original:
        context.note(f"{sum(a != b for a, b in zip(first, work.original, strict=True))} nodes run at another time")
    if twice:
        longer = work.seconds(order) / work.seconds(work.original) - 1
        what = ", ".join(f"{count} {op}" for op, count in twice.most_common())
        context.note(f"computed again: {what}; {longer:+.1%} of the predicted time")
