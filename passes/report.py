"""What passes did: one entry per pass, printed as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from regauge.ir.cost import Figures
from regauge.ir.tables import format_table, short
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
        cuts = list(dict.fromkeys(str(cut) for cut in self.cuts))
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


def _change(before: int, after: int) -> str:
    if before == after:
        return short(after)
    share = f" ({after / before:.1%})" if before else ""
    return f"{short(before)} -> {short(after)}{share}"
