"""Results that torch.export does not take: caches and other objects that are no pytree, unregistered dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils import _pytree as pytree

_PLAIN = (torch.Tensor, bool, int, float, complex, str, type(None), torch.SymInt, torch.SymFloat, torch.SymBool)


def plain_outputs(result: Any, changes: list[str] | None = None) -> Any:
    """``result`` with dataclasses as dicts of their fields and every other unknown object as None.

    What was done is told in ``changes``.
    """

    def note(text: str) -> None:
        if changes is not None and text not in changes:
            changes.append(text)

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, _PLAIN):
            return leaf
        name = type(leaf).__name__
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            note(f"a {name} became a dict (register it with torch.export.register_dataclass to keep it)")
            return plain_outputs({f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}, changes)
        note(f"a {name} is left out, since torch.export does not know it (for a cache: use_cache=False)")
        return None

    return pytree.tree_map(plain, result)
