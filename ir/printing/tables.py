"""Tables as plain text: what reports, comparisons and the command line print."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest

Rows = Sequence[Sequence[str]]
_GAP = "  "
_LEAST_TEXT = 20  # columns that broken text needs to be read


def format_table(rows: Rows, width: int | None = None) -> list[str]:
    """A header and rows as aligned lines; see :func:`right_aligned`.

    In ``width`` columns, text is broken between words where a table is wider; where that does not help, every row is
    written as a block of its own, its cells one below the other under the header's names.
    """
    right = right_aligned(rows)
    widths = _fitted(rows, right, width)
    if widths is None:
        return [line for row in rows[1:] for line in _block(rows[0], row, width or 0)]
    return [line for row in rows for line in _lines(row, widths, right)]


def _fitted(rows: Rows, right: Sequence[bool], width: int | None) -> list[int] | None:
    """Widths of the columns; None where they do not fit even with text broken. Figures are never broken."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    if width is None:
        return widths
    least = [
        natural if figures else min(natural, max(_LEAST_TEXT, *(len(word) for cell in column for word in _words(cell))))
        for column, natural, figures in zip(columns, widths, right, strict=True)
    ]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > width:
        widest = max(range(len(widths)), key=lambda place: widths[place] - least[place])
        if widths[widest] <= least[widest]:
            return None
        widths[widest] -= 1
    return widths


def _words(cell: str) -> list[str]:
    return cell.split() or [""]


def _lines(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    cells = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
    return [
        _GAP.join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in zip_longest(*cells, fillvalue="")
    ]


def _block(header: Sequence[str], row: Sequence[str], width: int) -> list[str]:
    """One row as a heading, its first cell, and a line per cell."""
    titles = max(map(len, header))
    lines = [row[0]]
    for title, cell in zip(header[1:], row[1:], strict=True):
        first, *rest = _wrapped(cell, max(width - titles - 2 * len(_GAP), _LEAST_TEXT))
        if cell:
            lines.append(f"{_GAP}{title.ljust(titles)}{_GAP}{first}")
            lines += [" " * (titles + 2 * len(_GAP)) + more for more in rest]
    return lines


def _wrapped(cell: str, width: int) -> list[str]:
    if len(cell) <= width:
        return [cell]
    return textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False) or [""]


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
