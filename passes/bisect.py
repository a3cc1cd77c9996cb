"""Finds the first pass, and the part of it, that breaks a check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.base import Pass, Replayed
from regauge.passes.catalog import Passes, as_passes
from regauge.passes.pipeline import run_passes

Check = Callable[[Graph], bool]


@dataclass(frozen=True)
class Culprit:
    """The first change after which a check fails: the pass, and the Dim or site where the pass has a ``limit``."""

    index: int
    one: Pass
    site: str = ""

    def __str__(self) -> str:
        return f"pass {self.index + 1}, {self.one}" + (f", at {self.site}" if self.site else "")


def bisect(graph: Graph, passes: Passes, check: Check, data: Any = None) -> Culprit | None:
    """The first pass after which ``check(graph)`` is false, or None when it is true after all of them.

    A pass with an option ``limit`` (do only the first so many changes) is run again with half as many until the first
    change that does harm is found. Raises PassError when the check fails before any pass has run.
    """
    if not check(graph):
        raise PassError("the check fails on the graph before any pass: there is nothing to bisect")
    data = Replayed(data) if isinstance(data, Iterator) else data
    before = graph
    for index, one in enumerate(as_passes(passes)):
        after = run_passes(before, [one], data)
        if not check(after):
            return Culprit(index, *_narrowed(before, one, after, check, data))
        before = after
    return None


def _narrowed(before: Graph, one: Pass, after: Graph, check: Check, data: Any) -> tuple[Pass, str]:
    """The pass with the smallest limit at which the check fails, and the last site it changes."""
    sites = [cut.dim for cut in after.report.passes[0].cuts]
    if not sites or not any(entry.name == "limit" for entry in fields(one)):
        return one, ""
    fine, broken = 0, len(sites)
    while broken - fine > 1:
        middle = (fine + broken) // 2
        if check(run_passes(before, [_limited(one, middle)], data)):
            fine = middle
        else:
            broken = middle
    return _limited(one, broken), sites[broken - 1]


def _limited(one: Pass, limit: int) -> Pass:
    changes: dict[str, Any] = {"limit": limit}
    return replace(one, **changes)
