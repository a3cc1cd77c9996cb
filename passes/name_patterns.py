"""Globs on names, as the options ``include`` and ``exclude`` of passes take them.

A glob matches a name (``head.weight``), or a module that the name is in: ``head`` is ``head.*``, ``2`` is ``2.*``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from regauge.ir.errors import PassError


def matches(names: Iterable[str], patterns: Collection[str]) -> bool:
    """Whether any of the globs matches any of the names, or a module that one of them is in."""
    return any(fnmatchcase(name, glob) for name in names for p in patterns for glob in (p, f"{p}.*"))


def check_patterns(
    option: str, patterns: Collection[str], names: Collection[str], *, what: str = "parameter", otherwise: str = ""
) -> None:
    """Raise PassError for a glob that matches no name of a ``what``, with names like it, or ``otherwise``."""
    for pattern in patterns:
        if not matches(names, [pattern]):
            modules = {name.rpartition(".")[0] for name in names}  # modules count too: haed.* is near head
            close = get_close_matches(pattern.rstrip("*.:?"), sorted({*names, *modules} - {""}), 2)
            hint = f"did you mean {' or '.join(close)}?" if close else otherwise
            raise PassError(f"{option}={pattern} matches no {what}{hint and ': '}{hint}")
