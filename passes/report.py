"""What passes did: one entry per pass, printed as a table."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from regauge.ir.cost import Figures, figures
from regauge.ir.graph import Graph
from regauge.ir.printing.tables import format_table, short
from regauge.passes.base import Cut, reasons

_SHOWN_CUTS = 12
_SHOWN_REASONS = 6


@dataclass(frozen=True)
class PassReport:
    """What one pass did to a graph."""

    text: str
    contract: str
    before: Figures
    after: Figures
    seconds: float
    changed: bool
    error: float | None = None  # greatest relative difference of outputs, where the pass promises to be exact
    cuts: tuple[Cut, ...] = ()
    notes: tuple[str, ...] = ()
    left: Mapping[str, int] = field(default_factory=dict)  # why Dims or sites were left alone: reason -> how many

    def lines(self) -> list[str]:
        """The details below the table."""
        lines = list(self.notes)
        losses: dict[str, dict[str, None]] = {}
        for cut in self.cuts:
            losses.setdefault(str(cut), {}).update(dict.fromkeys(cut.lost))
        cuts = [f"{text}; not made up for: {', '.join(lost)}" if lost else text for text, lost in losses.items()]
        lines += cuts[:_SHOWN_CUTS]
        if len(cuts) > _SHOWN_CUTS:
            lines.append(f"... and {len(cuts) - _SHOWN_CUTS} more")
        left = [f"left alone: {reason}" for reason in reasons(self.left)]
        lines += left[:_SHOWN_REASONS]
        if len(left) > _SHOWN_REASONS:
            lines.append(f"... and {len(left) - _SHOWN_REASONS} more reasons, in report.passes[...].left")
        return lines


@dataclass(frozen=True)
class Report:
    """What a pipeline did; ``print(graph.report)`` shows it."""

    passes: tuple[PassReport, ...] = ()

    @property
    def before(self) -> Figures:
        return self.passes[0].before if self.passes else Figures(0, 0, 0)

    @property
    def after(self) -> Figures:
        return self.passes[-1].after if self.passes else Figures(0, 0, 0)

    def rows(self) -> list[list[str]]:
        """A header and one row per pass."""
        rows = [["pass", "parameters", "MACs", "bytes", "max error", "seconds"]]
        for entry in self.passes:
            changes = [_change(a, b) for a, b in zip(entry.before, entry.after, strict=True)]
            error = "-" if entry.error is None else f"{entry.error:.1e}"
            rows.append([entry.text, *changes, error, f"{entry.seconds:.2f}"])
        return rows

    def __str__(self) -> str:
        if not self.passes:
            return "no passes"
        lines = format_table(self.rows())
        for entry in self.passes:
            lines += ["", entry.text, *(f"  {line}" for line in entry.lines())] if entry.lines() else []
        return "\n".join(lines)


def reported(
    before: Graph,
    after: Graph,
    text: str,
    since: float,
    cuts: Iterable[Cut],
    left: Mapping[str, int],
    notes: Iterable[str] = (),
) -> Graph:
    """``after`` with a report of the one step that made it of ``before``, where no pipeline did.

    ``since`` is what ``time.perf_counter`` gave when the step began.
    """
    seconds = time.perf_counter() - since
    sizes = figures(before), figures(after)
    entry = PassReport(
        text, "approximate", *sizes, seconds, True, cuts=tuple(cuts), notes=tuple(notes), left=dict(left)
    )
    after.report = Report((entry,))
    return after


def recorded_cuts(before: Graph, after: Graph) -> tuple[Cut, ...]:
    """What was cut on the way from one graph to another, as ``resize`` wrote it into the history."""
    new = after.history[len(before.history) :] if after is not before else []
    return tuple(Cut(*edit.sizes) for edit in new if edit.sizes is not None and edit.sizes[1] != edit.sizes[2])


def sparse_cut(name: str, entries: int, zeros: int) -> Cut:
    """A weight of which some entries are zero."""
    return Cut(name, entries, entries - zeros, f"{name}: {zeros / entries:.1%} zero")


def _change(before: int, after: int) -> str:
    if before == after:
        return short(after)
    share = f" ({after / before:.1%})" if before else ""
    return f"{short(before)} -> {short(after)}{share}"
