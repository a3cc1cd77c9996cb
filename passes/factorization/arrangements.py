"""Rearranging the axes of a value between two links: a reshape, a permutation and a reshape, those of them it takes.

The notation is that of einops (Rogozhnikov 2022): ``... (k i)`` is the features in one axis, ``k (...) i`` a batch of
matrices, with the leading axes of the value, whatever they are, run together to their rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regauge.ir.edit import Builder
from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import Size, product

_LEADING = "..."
_Layout = list[str | list[str]]  # axes, lists of those that run together in one


@dataclass(frozen=True)
class Arrangement:
    """From one order of axes to another; ``sizes`` are those of the named ones."""

    before: str
    after: str
    sizes: Mapping[str, int]

    def write(self, build: Builder, value: Value, leading: Sequence[Size]) -> Value:
        """The nodes that do it to a value whose leading axes, before they run together, have these sizes."""
        given, wanted = _parsed(self.before), _parsed(self.after)
        sizes: dict[str, Any] = {**self.sizes, _LEADING: product(leading)}
        if _LEADING in given and _LEADING in wanted:
            names = [f"{_LEADING}{axis}" for axis in range(len(leading))]
            sizes.update(zip(names, leading, strict=True))
            given, wanted = _spread(given, names), _spread(wanted, names)
        atoms, order = _flat(given), _flat(wanted)
        value = _reshaped(build, value, [sizes[name] for name in atoms])
        if order != atoms:
            value = build.permute(value, dims=tuple(atoms.index(name) for name in order))
        target: list[Size] = []
        for part in wanted:
            alone = [part] if isinstance(part, str) else part
            target += leading if part == _LEADING else [product(sizes[name] for name in alone)]
        return _reshaped(build, value, target)


def _parsed(text: str) -> _Layout:
    tokens = re.findall(r"\([^)]*\)|\S+", text)
    return [token.strip("()").split() if token.startswith("(") else token for token in tokens]


def _flat(layout: _Layout) -> list[str]:
    return [name for part in layout for name in ([part] if isinstance(part, str) else part)]


def _spread(layout: _Layout, names: Sequence[str]) -> _Layout:
    return [part for given in layout for part in (names if given == _LEADING else [given])]


def _reshaped(build: Builder, value: Value, shape: Sequence[Size]) -> Value:
    if tuple(shape) == tuple(value.shape):
        return value
    found: Value = build.reshape(value, shape=tuple(shape))
    return found
