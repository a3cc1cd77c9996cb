"""Extents: what the indices of an axis are, as a small tree of Dims.

    Extent = Dim                      an atomic run of n indices
           | Product(e1, ..., ek)     row-major, e1 slowest           written (h d)
           | Concat(e1, ..., ek)      segments laid end to end        written (a + b)

A Dim starts free. Unifying it with another extent *binds* it; a bound Dim stands for what it is bound to, so a Dim may
turn out later to be a Product or a Concat of smaller Dims (refinement). Always read an extent through :func:`resolve`.
The axis of size 1 is the empty product ``ONE``: it vanishes inside a Product, and is kept as a segment of a Concat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from regauge.ir.sizes.expressions import Size, product, total

MAX_PINS = 6  # reasons kept per Dim; a residual stream through a thousand convolutions needs no thousand reasons


class Pin(NamedTuple):
    """Why the indices of a Dim may not be removed: the reason in words, and the node, input or output that said so."""

    reason: str
    where: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.where})" if self.where else self.reason


class Dim:
    """An atomic run of ``size`` indices: the unit of union-find. Identity is what matters, not the name."""

    __slots__ = ("size", "bound", "pins", "name")

    def __init__(self, size: Size, name: str = "") -> None:
        self.size: Size = size
        self.bound: Any = None  # an Extent once the Dim is bound
        self.pins: tuple[Pin, ...] = ()
        self.name = name

    def __repr__(self) -> str:
        return format_extent(self)


class Product:
    """Row-major product of extents; ``factors[0]`` is the slowest index."""

    __slots__ = ("factors", "size")

    def __init__(self, factors: Sequence[Extent]) -> None:
        self.factors = tuple(factors)
        self.size: Size | None = None  # once somebody asked :func:`size_of`

    def __repr__(self) -> str:
        return format_extent(self)


class Concat:
    """Segments laid end to end."""

    __slots__ = ("segments", "size")

    def __init__(self, segments: Sequence[Extent]) -> None:
        self.segments = tuple(segments)
        self.size: Size | None = None  # once somebody asked :func:`size_of`

    def __repr__(self) -> str:
        return format_extent(self)


Extent: TypeAlias = Dim | Product | Concat
ONE = Product(())
ZERO = Concat(())


def fresh(size: Size, name: str = "") -> Extent:
    """A new free Dim, or ONE / ZERO for the sizes 1 and 0, which have no indices to choose from."""
    if isinstance(size, int) and size <= 1:
        return ONE if size == 1 else ZERO
    return Dim(size, name)


def resolve(extent: Extent) -> Extent:
    """The normal form: bound Dims replaced, nested Products and Concats flattened, ones and zeros dropped."""
    if isinstance(extent, Dim):
        bound = extent.bound
        if bound is None:
            return extent
        # the usual chain has one link; what it leads to is bound itself, or not a Dim, only after a refinement
        return bound if isinstance(bound, Dim) and bound.bound is None else _resolve_dim(extent)
    if isinstance(extent, Product):
        return _resolve_product(extent) if extent.factors else ONE
    return _resolve_concat(extent)


def _resolve_dim(dim: Dim) -> Extent:
    chain: list[Dim] = []
    end: Extent = dim
    while isinstance(end, Dim) and end.bound is not None:
        chain.append(end)
        end = end.bound
    if not isinstance(end, Dim):
        end = resolve(end)
    for link in chain:  # path compression keeps later reads short
        link.bound = end
    return end


def _resolve_product(extent: Product) -> Extent:
    factors: list[Extent] = []
    changed = empty = False
    for factor in extent.factors:
        if isinstance(factor, Dim) and factor.bound is None:
            factors.append(factor)
            continue
        found = resolve(factor)
        if isinstance(found, Product):
            factors.extend(found.factors)
            changed = True
            continue
        changed = changed or found is not factor
        empty = empty or (isinstance(found, Concat) and not found.segments)
        factors.append(found)
    if empty:
        return ZERO
    if len(factors) == 1:
        return factors[0]
    return Product(factors) if changed else extent


def _resolve_concat(extent: Concat) -> Extent:
    segments: list[Extent] = []
    changed = False
    for segment in extent.segments:
        found = resolve(segment)
        if isinstance(found, Concat):
            segments.extend(found.segments)
            changed = True
            continue
        changed = changed or found is not segment
        segments.append(found)
    if len(segments) == 1:
        return segments[0]
    return Concat(segments) if changed else extent


def size_of(extent: Extent) -> Size:
    if isinstance(extent, Dim):
        return extent.size
    if extent.size is None:  # kept, since what its parts are bound to later has the same size
        if isinstance(extent, Product):
            extent.size = product([size_of(factor) for factor in extent.factors])
        else:
            extent.size = total([size_of(segment) for segment in extent.segments])
    return extent.size


def is_one(extent: Extent) -> bool:
    """Whether an axis has size one; a Dim never has (see :func:`fresh`)."""
    return extent is ONE or (not isinstance(extent, Dim) and size_of(extent) == 1)


def leaves(extent: Extent) -> list[Dim]:
    """The Dims of an extent from left to right; a Dim that occurs twice comes twice."""
    found = resolve(extent)
    return [found] if isinstance(found, Dim) else _leaves_of(found)


def _leaves_of(extent: Product | Concat) -> list[Dim]:
    """The Dims of an extent in normal form, whose parts are in normal form too."""
    dims: list[Dim] = []
    for part in extent.factors if isinstance(extent, Product) else extent.segments:
        if isinstance(part, Dim):
            dims.append(part)
        else:
            dims.extend(_leaves_of(part))
    return dims


def pin(extent: Extent, reason: str, where: str = "") -> None:
    """Forbid the removal of indices from every Dim of the extent."""
    if isinstance(extent, Dim) and extent.bound is None and len(extent.pins) >= MAX_PINS:
        return  # most of the spatial axes of a deep network: no reason is made up only to be dropped
    add_pins(extent, (Pin(reason, where),))


def add_pins(extent: Extent, pins: tuple[Pin, ...]) -> None:
    for dim in leaves(extent):
        if not dim.pins:
            dim.pins = pins
            continue
        if len(dim.pins) >= MAX_PINS:
            continue
        for item in pins:
            if len(dim.pins) < MAX_PINS and item not in dim.pins:
                dim.pins = (*dim.pins, item)


def bind(dim: Dim, target: Extent) -> None:
    """Let a free Dim stand for ``target``; a Dim inside its own target has no finite meaning and is pinned."""
    if target is dim:
        return
    if not isinstance(target, Dim) and any(leaf is dim for leaf in leaves(target)):
        pin(target, "an axis is laid out inside itself (cyclic)")
        return
    dim.bound = target
    if dim.pins:
        add_pins(target, dim.pins)
    if isinstance(target, Dim) and not target.name:
        target.name = dim.name


def positions_on(extent: Extent, dim: Dim) -> np.ndarray:
    """The positions on an axis that each index of a Dim owns, [indices, positions each]."""
    found = resolve(extent)
    if isinstance(found, Dim):
        return np.arange(int(dim.size))[:, None]
    if isinstance(found, Product):
        grid = np.arange(int(size_of(found))).reshape([int(size_of(factor)) for factor in found.factors])
        place = next(p for p, factor in enumerate(found.factors) if dim in leaves(factor))
        inner = positions_on(found.factors[place], dim)
        rows: np.ndarray = np.moveaxis(grid, place, 0).reshape(grid.shape[place], -1)[inner]
        return rows.reshape(len(inner), -1)
    parts, offset = [], 0
    for segment in found.segments:
        if dim in leaves(segment):
            parts.append(positions_on(segment, dim) + offset)
        offset += int(size_of(segment))
    return np.concatenate(parts, 1)


def coordinates(extent: Extent, dim: Dim) -> tuple[np.ndarray, np.ndarray]:
    """Of each position on an axis: the index of a Dim there, -1 where it has none, and how far it is to the next."""
    found = resolve(extent)
    if isinstance(found, Dim):
        size = int(found.size)
        own = found is dim
        return (np.arange(size), np.ones(size, int)) if own else (np.full(size, -1), np.zeros(size, int))
    if isinstance(found, Product):
        sizes = [int(size_of(factor)) for factor in found.factors]
        for place, factor in enumerate(found.factors):
            if dim in leaves(factor):
                index, step = coordinates(factor, dim)
                rest = int(np.prod(sizes[place + 1 :]))
                shape = [-1 if other == place else 1 for other in range(len(sizes))]
                spread = [np.broadcast_to(part.reshape(shape), sizes).reshape(-1) for part in (index, step * rest)]
                return spread[0], spread[1]
        whole = int(np.prod(sizes))
        return np.full(whole, -1), np.zeros(whole, int)
    parts = [coordinates(segment, dim) for segment in found.segments]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True)) if parts else (np.zeros(0, int),) * 2  # type: ignore[return-value]


def format_extent(extent: Extent) -> str:
    """``conv1.weight:0=64``, ``(h=8 d=16)``, ``(a=3 + b=5)``; a pinned Dim carries a ``!``."""
    found = resolve(extent)
    if isinstance(found, Dim):
        return f"{found.name or 'dim'}={found.size}{'!' if found.pins else ''}"
    if isinstance(found, Product):
        return "(" + " ".join(format_extent(f) for f in found.factors) + ")" if found.factors else "1"
    return "(" + " + ".join(format_extent(s) for s in found.segments) + ")" if found.segments else "0"
