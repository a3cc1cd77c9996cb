"""The few flags that change how Regauge works, never what it computes: one typed registry.

Set them by environment variable (``REGAUGE_VERIFY=off``), or for a block of code:

    with regauge.settings.using(print_after=True):
        regauge.optimize(graph, "prune{ratio=0.5}")
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_type_hints

from regauge.ir.errors import RegaugeError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All flags with their defaults."""

    verify: Literal["off", "structure", "numeric"] = "numeric"  # what is checked after every pass
    print_after: bool = False  # print the graph after every pass that changed it, on stderr
    trace: bool = False  # print a line for every pass when it starts and ends, on stderr


_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off", ""}


def _checked(name: str, value: Any) -> Any:
    hints = get_type_hints(Settings)
    if name not in hints:
        close = get_close_matches(name, hints, 1)
        hint = f": did you mean {close[0]!r}?" if close else f": settings are {', '.join(hints)}"
        raise RegaugeError(f"there is no setting {name!r}{hint}")
    if hints[name] is bool:
        if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
            return value.lower() in _TRUE
        if isinstance(value, bool):
            return value
        raise RegaugeError(f"setting {name} is a switch: give true or false, not {value!r}")
    choices = get_args(hints[name])
    if value not in choices:
        raise RegaugeError(f"setting {name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def _from_environment() -> Settings:
    given = {
        field.name: _checked(field.name, os.environ[variable])
        for field in fields(Settings)
        if (variable := f"REGAUGE_{field.name.upper()}") in os.environ
    }
    return Settings(**given)


_current: ContextVar[Settings | None] = ContextVar("regauge_settings", default=None)


def current() -> Settings:
    """The settings in force; raises RegaugeError where an environment variable has a value that means nothing."""
    found = _current.get()
    if found is None:
        found = _from_environment()
        _current.set(found)
    return found


@contextmanager
def using(**changes: Any) -> Iterator[Settings]:
    """Change settings for a block of code; raises RegaugeError for an unknown name or value."""
    token = _current.set(replace(current(), **{name: _checked(name, value) for name, value in changes.items()}))
    try:
        yield current()
    finally:
        _current.reset(token)
