"""Budgets, one or several at once: what a graph may cost, and how much of that it uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from regauge.ir.cost import Meter
from regauge.ir.dims.extents import Dim
from regauge.passes.allocation.amounts import Unit, shown


@dataclass
class Budget:
    """One figure and the most it may be; ``name`` is the option that asked for it."""

    name: str
    meter: Meter
    target: float
    unit: Unit = "count"

    @property
    def load(self) -> float:
        """How much of the budget is used: above 1 it is exceeded."""
        return self.load_of(self.meter.total)

    def load_of(self, total: float) -> float:
        """The load if the figure were another one; of a figure that is 0 from the start nothing is used."""
        return total / self.target if self.target > 0 else float("inf") if total > 0 else 0.0

    def show(self, number: float) -> str:
        return shown(number, self.unit)

    def __str__(self) -> str:
        total, original = self.show(self.meter.total), self.show(self.meter.original)
        return f"{self.name}: {total} of {original}, {self.show(self.target)} asked"


class Budgets:
    """All budgets together: the load of the one that is used most, which must not exceed 1.

    It is itself a :class:`regauge.ir.cost.Meter`, so that what meets one budget meets several.
    """

    def __init__(self, budgets: Sequence[Budget]) -> None:
        self.budgets = list(budgets)
        self.original = max(budget.load_of(budget.meter.original) for budget in self.budgets)

    def __iter__(self) -> Iterator[Budget]:
        return iter(self.budgets)

    @property
    def total(self) -> float:
        return max(budget.load for budget in self.budgets)

    @property
    def tightest(self) -> Budget:
        return max(self.budgets, key=lambda budget: budget.load)

    def set_sizes(self, sizes: Mapping[Dim, int]) -> float:
        for budget in self.budgets:
            budget.meter.set_sizes(sizes)
        return self.total

    def with_size(self, dim: Dim, size: int) -> float:
        return max(budget.load_of(budget.meter.with_size(dim, size)) for budget in self.budgets)


class IndexCount:
    """How many indices are kept, of all Dims together: what a ratio is a budget of, where they are chosen together."""

    def __init__(self, sizes: Mapping[Dim, int]) -> None:
        self._sizes = dict(sizes)
        self.original = self.total = float(sum(sizes.values()))

    def set_sizes(self, sizes: Mapping[Dim, int]) -> float:
        for dim in sizes:
            self.total += sizes[dim] - self._sizes[dim]
        self._sizes.update(sizes)
        return self.total

    def with_size(self, dim: Dim, size: int) -> float:
        return self.total + size - self._sizes[dim]
