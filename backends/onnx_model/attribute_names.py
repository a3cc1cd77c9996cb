"""Attributes that are called like a word of Python: ``ModuleDict({"in": ..., "class": ...})`` has such.

The exporter has torch.fx write source that reads each parameter, ``self.module.layers.class.weight``, and Python cannot
read that. torch.fx takes care of names that are no identifiers, but not of those.
"""

from __future__ import annotations

import contextlib
import keyword
from collections.abc import Iterator
from unittest import mock

import torch.fx.graph

_WRITTEN = "_format_target"


@contextlib.contextmanager
def readable_attributes() -> Iterator[None]:
    """Source that torch.fx writes within reads such attributes by ``getattr``; a torch without the place works as it
    does."""
    if hasattr(torch.fx.graph, _WRITTEN):
        with mock.patch.object(torch.fx.graph, _WRITTEN, _attribute):
            yield
    else:
        yield


def _attribute(base: str, target: str) -> str:
    written = base
    for name in target.split("."):
        plain = name.isidentifier() and not keyword.iskeyword(name)
        written = f"{written}.{name}" if plain else f"getattr({written}, {name!r})"
    return written
