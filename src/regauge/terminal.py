"""What the command line prints: tables and text as wide as the terminal, and as they are in a pipe."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator

from regauge.ir.printing.tables import Rows, format_table


def width() -> int | None:
    """Columns of the terminal that stdout is; None for a pipe or a file, where nothing is wrapped."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(rows: Rows) -> None:
    """A header and rows, aligned; see :func:`regauge.ir.printing.tables.format_table`."""
    print("\n".join(format_table(rows, width())))


def print_text(text: str) -> None:
    """Lines, each wrapped with a hanging indent where the terminal is narrower."""
    print("\n".join(wrapped(text, width())))


def wrapped(text: str, columns: int | None) -> Iterator[str]:
    """The lines of a text, those that are too long broken between words and continued two columns further in."""
    for line in text.splitlines():
        if columns is None or len(line) <= columns:
            yield line
            continue
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        yield from textwrap.wrap(
            line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )


def print_prose(text: str) -> None:
    """A docstring: paragraphs are filled to the terminal, examples, which are laid out by hand, left alone."""
    print("\n\n".join(filled(text, width())))


def filled(text: str, columns: int | None) -> Iterator[str]:
    """The paragraphs of a text."""
    for paragraph in text.split("\n\n"):
        by_hand = any("  " in line for line in paragraph.splitlines())
        if columns is None or by_hand:
            yield paragraph
        else:
            yield textwrap.fill(paragraph, columns, break_long_words=False, break_on_hyphens=False)
