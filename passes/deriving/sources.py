"""What a search makes of values: tensors, what they are computed from, and terms that are products of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from regauge.ir.graph import Parameter, Value
from regauge.passes.deriving.expressions import Axes, Index, Places, Range


@dataclass(frozen=True)
class Tensor:
    """A source, read along these indices: the source says how many they are, and a term which."""

    source: Source
    indices: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A value of the graph, or a range or window, its axes taken apart into the indices of ``axes``."""

    value: Value | Places
    axes: Axes


def places_of(tensor: Tensor | None) -> Places | None:
    """The range or window that a tensor stands for; None of others."""
    source = None if tensor is None else tensor.source
    return source.value if isinstance(source, Leaf) and isinstance(source.value, Places) else None


def range_of(tensor: Tensor | None) -> Range | None:
    """The range that a tensor stands for; None of others."""
    found = places_of(tensor)
    return found if isinstance(found, Range) else None


def window_ends(tensor: Tensor) -> tuple[Index | None, Index | None, Index | None]:
    """The indices (wide, out, tap) along which a window is read; None of an axis of size 1."""
    assert isinstance(tensor.source, Leaf)
    left = list(tensor.indices)
    wide, out, tap = (left.pop(0) if axis else None for axis in tensor.source.axes)
    return wide, out, tap


def turned(window: Tensor, *, spread: bool) -> tuple[Index | None, Index | None, Index | None]:
    """The index that a window reads, the one that it gives, and its tap; transposed from out to wide."""
    wide, out, tap = window_ends(window)
    return (out, wide, tap) if spread else (wide, out, tap)


@dataclass(frozen=True, eq=False)
class Contracted:
    """The product of two tensors, with the indices ``kept``; all others are summed."""

    left: Tensor
    right: Tensor | None  # None: a sum of one
    kept: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Convolved:
    """``kernel`` moved over ``x`` in windows, with the indices ``kept``; ``spread``: transposed, from out to wide."""

    left: Tensor
    right: Tensor
    windows: tuple[Tensor, ...]
    spread: bool
    kept: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Shifted:
    """A tensor with an index of taps, whose parts are added up, each from its place in a window."""

    left: Tensor
    window: Tensor
    spread: bool
    kept: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Unfolded:
    """What windows read of a tensor: it has an index of windows and one of taps in place of the wide one."""

    left: Tensor
    window: Tensor
    kept: tuple[Index, ...]


@dataclass(frozen=True, eq=False)
class Gathered:
    """A sum of tensors, each with its scale, along the indices ``kept``."""

    parts: tuple[tuple[float, Tensor], ...]
    kept: tuple[Index, ...]


Source: TypeAlias = Leaf | Contracted | Convolved | Shifted | Unfolded | Gathered
Product: TypeAlias = tuple[float, tuple[Tensor, ...]]
Products: TypeAlias = tuple[Product, ...]


@dataclass(frozen=True)
class State:
    """Terms, what was computed for them, and the predicted seconds of that."""

    terms: Products
    computed: frozenset[Source]
    seconds: float


def read_by(source: Source) -> tuple[Tensor, ...]:
    """The tensors that a source is computed from, without ranges and windows."""
    if isinstance(source, Leaf):
        return ()
    if isinstance(source, Gathered):
        return tuple(tensor for _, tensor in source.parts)
    given = (source.left, None if isinstance(source, Shifted | Unfolded) else source.right)
    return tuple(tensor for tensor in given if tensor is not None and places_of(tensor) is None)


def is_part(source: Source) -> bool:
    """Whether a source is a part of a weight, of which nothing has to be copied at a run; not zeros around one."""
    while isinstance(source, Contracted):
        found = range_of(source.right)
        if found is None or source.right is None or source.right.indices[0] in source.kept:  # the wide one
            return False
        source = source.left.source
    return isinstance(source, Leaf) and isinstance(source.value, Parameter)


def computed_for(sources: Iterable[Source]) -> Iterator[Source]:
    """These sources and all that they are computed from, each once for each that reads it."""
    for source in sources:
        yield source
        yield from computed_for(tensor.source for tensor in read_by(source))


def biases(terms: Products) -> dict[int, int]:
    """Terms that are products, with the terms that are a bias of their columns, or alike for some of them."""
    every = [source for _, tensors in terms for source in computed_for(tensor.source for tensor in tensors)]
    found: dict[int, int] = {}
    for place, (scale, tensors) in enumerate(terms):
        top = tensors[0].source if len(tensors) == 1 and scale == 1 else None
        if not isinstance(top, Contracted | Convolved) or top.right is None or places_of(top.right) is not None:
            continue
        read = dict(zip(top.kept, tensors[0].indices, strict=True))
        own = {read[i] for i in top.right.indices if i in read and not _batch(top, i)}
        if not own or every.count(top) > 1:
            continue
        for other, (size, others) in enumerate(terms):
            flat = len(others) == 1 and size == 1 and isinstance(others[0].source, Leaf)
            if flat and other not in found.values() and others[0].indices and set(others[0].indices) <= own:
                found[place] = other
                break
    return found


def rules_of(terms: Products) -> list[str]:
    """The rules by which terms were made, each once, in words."""
    found = {_rule(source) for _, tensors in terms for source in computed_for(tensor.source for tensor in tensors)}
    return [rule for rule in RULES if rule in found]


RULES = (
    "products in another order",
    "a common factor",
    "ranges relaxed or tightened",
    "a convolution over other axes",
    "taps of a product added up",
    "taps as channels",
)


def _rule(source: Source) -> str | None:
    if isinstance(source, Contracted):
        return RULES[0] if range_of(source.right) is None else RULES[2]
    kinds = {Gathered: RULES[1], Convolved: RULES[3], Shifted: RULES[4], Unfolded: RULES[5]}
    return kinds.get(type(source))


def _batch(top: Contracted | Convolved, index: Index) -> bool:
    """Whether an index is one of both operands of a product of matrices."""
    return isinstance(top, Contracted) and index in top.left.indices
