"""Shows the progress of a long step on stderr, where that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_EVERY = 0.2  # seconds between two lines


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A function to call after each of ``total`` steps, 0 where nobody knows how many.

    The line it writes over and over is wiped at the end.
    """
    shown, done, last = sys.stderr.isatty(), 0, 0.0

    def advance() -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if shown and now - last > _EVERY:
            last = now
            sys.stderr.write(f"\r{what}: {done}/{total} " if total else f"\r{what}: {done} ")
            sys.stderr.flush()

    try:
        yield advance
    finally:
        if shown and done:
            sys.stderr.write("\r" + " " * (len(f"{what}: {done}/{total} ")) + "\r")
            sys.stderr.flush()
