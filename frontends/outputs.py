"""Results that torch.export does not take: caches and other objects that are no pytree, dataclasses nobody registered."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils import _pytree as pytree

_PLAIN = (torch.Tensor, bool, int, float, complex, str, type(None), torch.SymInt, torch.SymFloat, torch.SymBool)


def plain_outputs(result: Any) -> Any:
    """``result`` with dataclasses as dicts of their fields and every other unknown object as None."""

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, _PLAIN):
            return leaf
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}
            return plain_outputs(fields)
        return None

    return pytree.tree_map(plain, result)


def unknown_outputs(result: Any) -> list[str]:
    """Class names of the objects that :func:`plain_outputs` leaves out."""
    found: dict[str, None] = {}
    for leaf in pytree.tree_leaves(result):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}
            found.update(dict.fromkeys(unknown_outputs(fields)))
        elif not isinstance(leaf, _PLAIN):
            found[type(leaf).__name__] = None
    return list(found)
