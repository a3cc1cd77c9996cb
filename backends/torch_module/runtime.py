"""Emitted source as a living module: importable, shown in tracebacks, and carried along by pickle."""

from __future__ import annotations

import hashlib
import linecache
import sys
from types import ModuleType
from typing import Any

from torch import nn

PACKAGE = "regauge_emitted"


def import_source(source: str, name: str) -> ModuleType:
    """A module made from source, registered under a name that its text decides; the same text gives the same module."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:12]
    full_name = f"{PACKAGE}.{name}_{digest}"
    known = sys.modules.get(full_name)
    if known is not None:
        return known
    _register_package()
    filename = f"<{full_name}>"
    module = ModuleType(full_name)
    module.__file__ = filename
    module.__dict__["__regauge_source__"] = source
    module.__loader__ = _Loader(source)  # type: ignore[assignment]
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), module.__dict__)
    sys.modules[full_name] = module
    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == full_name and issubclass(value, nn.Module):
            value.__reduce__ = _reduce  # type: ignore[method-assign,assignment]
    return module


def restore(source: str, name: str, class_name: str) -> nn.Module:
    """An empty instance of an emitted class, for pickle; the class is made from the source where it is not known."""
    cls = getattr(import_source(source, name), class_name)
    instance: nn.Module = cls.__new__(cls)
    return instance


def source_of(module: nn.Module) -> str:
    """The source of the Python module that an emitted class lives in."""
    source: str = vars(sys.modules[type(module).__module__])["__regauge_source__"]
    return source


def _reduce(self: nn.Module) -> tuple[Any, ...]:
    cls = type(self)
    name = cls.__module__.removeprefix(PACKAGE + ".").rpartition("_")[0]
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # type: ignore[no-untyped-call]
    return restore, (source_of(self), name, cls.__qualname__), state


def _register_package() -> None:
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE, "Modules emitted by Regauge.")
        package.__path__ = []
        sys.modules[PACKAGE] = package


class _Loader:
    """What inspect and linecache ask for the text of a module that has no file."""

    def __init__(self, source: str) -> None:
        self.source = source

    def get_source(self, name: str) -> str:
        return self.source
