"""Tables as plain text: what reports, comparisons and the command line print."""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def format_table(rows: Rows) -> list[str]:
    """A header and rows as aligned lines; see :func:`right_aligned`."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = right_aligned(rows)
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def right_aligned(rows: Rows) -> list[bool]:
    """Which columns hold figures below their header; the first column holds names."""
    columns = zip(*rows[1:], strict=True) if len(rows) > 1 else [("",) for _ in rows[0]]
    return [index > 0 and any(column) and all(map(_is_figure, column)) for index, column in enumerate(columns)]


def _is_figure(cell: str) -> bool:
    return cell[:1].isdigit() or cell in ("", "-")


def short(number: float) -> str:
    """``11.7M`` for 11689512."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}" if abs(number) < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:.4g}"
