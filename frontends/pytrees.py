"""Nested inputs and outputs: flattened leaves with readable names such as ``cache.0.k``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Leaf:
    """One flattened input of a call: a tensor, or a constant that is baked into the graph."""

    name: str
    value: Any

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, torch.Tensor)


def step_name(key: Any) -> str:
    """One step of a path into a pytree: an index, a dictionary key or an attribute."""
    for field in ("idx", "key", "name"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def argument_names(forward: Any, count: int) -> list[str]:
    """Names of the first ``count`` positional arguments; those of ``*args`` are ``args.0``, ``args.1`` ..."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return [f"arg{i}" for i in range(count)]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "arg")
    return names + [f"{rest}.{i}" for i in range(count - len(names))]


def flatten_call(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Leaf], Any]:
    """The leaves of a call in torch's order, and the tree they were flattened from."""
    paths, spec = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    leaves = []
    for path, value in paths:
        head = names[int(step_name(path[1]))] if step_name(path[0]) == "0" else step_name(path[1])
        leaves.append(Leaf(".".join([head, *map(step_name, path[2:])]), value))
    return leaves, spec


def distinct(tree: Any) -> Any:
    """The tree with a tensor object that it holds twice cloned: torch.export takes one object for one input."""
    seen: set[int] = set()

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or id(leaf) not in seen:
            seen.add(id(leaf))
            return leaf
        return leaf.detach().clone()

    return pytree.tree_map(own, tree)


def flatten_outputs(result: Any) -> list[Any]:
    """The leaves of a result in torch's order."""
    return list(pytree.tree_flatten(result)[0])


def tensors_of(leaves: Sequence[Leaf]) -> list[torch.Tensor]:
    return [leaf.value for leaf in leaves if leaf.is_tensor]
