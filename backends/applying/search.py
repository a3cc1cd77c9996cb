"""Search for the integer attributes of the user's own modules that must shrink with the tensors.

A class bakes sizes into attributes: ``num_heads``, ``head_dim``, ``split_size``. A *move* gives one attribute of all
modules of one class the value that the change of their tensors suggests; at most three moves are combined.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any

from torch import nn

from regauge.backends.applying.check import Check
from regauge.backends.applying.layers import Changed, own_sizes
from regauge.ir.graph import Graph

MOST_MOVES = 3
_OWN = frozenset({"training", "call_super_init", "dump_patches"})


@dataclass(frozen=True)
class Move:
    """One attribute of the modules of one class, each with its new value."""

    attribute: str
    changes: tuple[tuple[nn.Module, Any], ...]

    def apply(self) -> list[tuple[nn.Module, str, Any]]:
        undo = [(module, self.attribute, module.__dict__[self.attribute]) for module, _ in self.changes]
        for module, value in self.changes:
            module.__dict__[self.attribute] = value
        return undo


def search(model: nn.Module, changed: Changed, check: Check, tries: int, dims: Changed) -> bool:
    """Leave the model with the first combination of moves that makes it agree with the graph; False where none does."""
    moves = list(possible_moves(model, changed, dims))
    for combination in _combinations(moves, tries):
        undo = [step for move in combination for step in move.apply()]
        if check.failure(model) is None:
            return True
        for module, attribute, value in reversed(undo):
            module.__dict__[attribute] = value
    return False


def _combinations(moves: list[Move], tries: int) -> Iterator[tuple[Move, ...]]:
    """Single moves first, then pairs, then triples; two values for one attribute are never combined."""
    left = tries
    for count in range(1, MOST_MOVES + 1):
        for chosen in combinations(moves, count):
            places = [(id(module), move.attribute) for move in chosen for module, _ in move.changes]
            if len(set(places)) != len(places):
                continue
            if left <= 0:
                return
            left -= 1
            yield chosen


def cut_dims(graph: Graph) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Dims that were cut, by the parameter they are named after: a count of heads shows in no tensor's shape alone."""
    found = (re.fullmatch(r"(.+):[\d.]+: (\d+) -> (\d+)", edit.what) for edit in graph.history)
    return {f"{m[1]}:{i}": ((int(m[2]),), (int(m[3]),)) for i, m in enumerate(found) if m}


def possible_moves(model: nn.Module, changed: Changed, dims: Changed) -> Iterator[Move]:
    """Moves for every integer attribute of modules that own or enclose changed tensors, the likeliest values first."""
    choices: dict[tuple[type, str], list[tuple[nn.Module, list[Any]]]] = {}
    for path, module in model.named_modules():
        pairs = _pairs({**changed, **dims}, path)
        if not pairs or type(module).__module__.startswith("torch.nn."):
            continue
        sizes = own_sizes(module, path, changed)
        settled = {new for now in sizes.values() for new in now} - {old for old, now in sizes.items() if len(now) > 1}
        for attribute, value in list(module.__dict__.items()):
            hidden = attribute in _OWN or attribute.startswith("_") or (isinstance(value, int) and value in settled)
            found = [] if hidden else _proposals(value, pairs)
            if found:
                choices.setdefault((type(module), attribute), []).append((module, found))
    ranked = sorted(choices.items(), key=lambda item: _likelihood(item[0][1]))
    most = max((len(found) for _, entries in ranked for _, found in entries), default=0)
    for rank in range(most):
        for (_, attribute), entries in ranked:
            picked = tuple((module, found[rank]) for module, found in entries if rank < len(found))
            if picked:
                yield Move(attribute, picked)


def _pairs(changed: Changed, path: str) -> list[tuple[int, int]]:
    """Old and new sizes of the axes that changed at or below a path, each pair once."""
    prefix = path + "." if path else ""
    pairs = {
        (before, after): None
        for name, (old, new) in changed.items()
        if name.startswith(prefix)
        for before, after in zip(old, new, strict=False)
        if before != after
    }
    return list(pairs)


def _proposals(value: Any, pairs: Iterable[tuple[int, int]]) -> list[Any]:
    """New values for an attribute: the new size where it is an old one, then the same share of it."""
    if isinstance(value, tuple) and value and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        mapped = dict(pairs)
        renewed = tuple(mapped.get(v, v) for v in value)
        return [renewed] if renewed != value else []
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        return []
    exact = [after for before, after in pairs if before == value]
    shares = sorted({Fraction(after, before) for before, after in pairs})
    scaled = [int(value * share) for share in shares if (value * share).denominator == 1 and value * share >= 1]
    return [new for new in dict.fromkeys([*exact, *scaled]) if new != value]


def _likelihood(attribute: str) -> tuple[int, str]:
    """Attributes that sound like a count of heads or a size come first."""
    words = ("head", "num", "dim", "size", "split", "channel", "width", "feature", "embed")
    return (next((i for i, word in enumerate(words) if word in attribute), len(words)), attribute)
