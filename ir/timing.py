"""Measured times of graphs, as whoever can run them hands them to passes, which cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from regauge.ir.graph import Graph


class Timing(NamedTuple):
    """The median time of one run; ``noise`` is the standard error of that median, as a share of it."""

    milliseconds: float
    noise: float = 0.0
    runtime: str = ""  # what it was measured in


Measure: TypeAlias = Callable[[Sequence[Graph], Any], list[Timing]]
"""``measure(graphs, inputs)`` times graphs in turns on one batch of inputs, or on made-up ones where that is None."""
