"""Globs on names, as the options ``include`` and ``exclude`` of passes take them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from regauge.ir.errors import PassError


def matches(names: Iterable[str], patterns: Collection[str]) -> bool:
    """Whether any of the names matches any of the globs."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


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
