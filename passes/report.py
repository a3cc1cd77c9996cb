"""What passes did: one entry per pass, printed as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from regauge.ir.cost import Figures
from regauge.passes.base import Cut

_SHOWN_CUTS = 12


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
        lines += [str(cut) for cut in self.cuts[:_SHOWN_CUTS]]
        if len(self.cuts) > _SHOWN_CUTS:
            lines.append(f"... and {len(self.cuts) - _SHOWN_CUTS} more")
        lines += [f"left alone: {count} x {reason}" for reason, count in self.left.items()]
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


def short(number: float) -> str:
    """``11.7M`` for 11689512."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}" if abs(number) < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:.4g}"


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned plain text, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
