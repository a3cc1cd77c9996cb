"""Extents: what the indices of an axis are, as a small tree of Dims.

    Extent = Dim                      an atomic run of n indices
           | Product(e1, ..., ek)     row-major, e1 slowest           written (h d)
           | Concat(e1, ..., ek)      segments laid end to end        written (a + b)

A Dim starts free. Unifying it with another extent *binds* it; a bound Dim stands for what it is bound to, so a Dim may
turn out later to be a Product or a Concat of smaller Dims (refinement). Always read an extent through :func:`resolve`.
The axis of size 1 is the empty product ``ONE``: it vanishes inside a Product, and is kept as a segment of a Concat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from regauge.ir.errors import AxisError
from regauge.ir.sizes import Size, divide, product, same, simplify, total

MAX_PINS = 6  # reasons kept per Dim; a residual stream through a thousand convolutions needs no thousand reasons


class Pin(NamedTuple):
    """Why the indices of a Dim may not be removed: the reason in words, and the node (or input, output) that said so."""

    reason: str
    where: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.where})" if self.where else self.reason


class Dim:
    """An atomic run of ``size`` indices: the unit of union-find. Identity is what matters, not the name."""

    __slots__ = ("size", "bound", "pins", "name")

    def __init__(self, size: Size, name: str = "") -> None:
        self.size: Size = size
        self.bound: Extent | None = None
        self.pins: list[Pin] = []
        self.name = name

    def __repr__(self) -> str:
        return format_extent(self)


class Product:
    """Row-major product of extents; ``factors[0]`` is the slowest index."""

    __slots__ = ("factors",)

    def __init__(self, factors: Sequence[Extent]) -> None:
        self.factors = tuple(factors)

    def __repr__(self) -> str:
        return format_extent(self)


class Concat:
    """Segments laid end to end."""

    __slots__ = ("segments",)

    def __init__(self, segments: Sequence[Extent]) -> None:
        self.segments = tuple(segments)

    def __repr__(self) -> str:
        return format_extent(self)


Extent = Dim | Product | Concat
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
        return _resolve_dim(extent)
    if isinstance(extent, Product):
        return _resolve_product(extent)
    return _resolve_concat(extent)


def _resolve_dim(dim: Dim) -> Extent:
    if dim.bound is None:
        return dim
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
    changed = False
    for factor in extent.factors:
        found = resolve(factor)
        if isinstance(found, Product):
            factors.extend(found.factors)
            changed = True
            continue
        changed = changed or found is not factor
        factors.append(found)
    if any(f is ZERO or (isinstance(f, Concat) and not f.segments) for f in factors):
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
    if isinstance(extent, Product):
        return product(size_of(f) for f in extent.factors)
    return total(size_of(s) for s in extent.segments)


def leaves(extent: Extent) -> Iterator[Dim]:
    """The Dims of an extent from left to right; a Dim that occurs twice comes twice."""
    found = resolve(extent)
    if isinstance(found, Dim):
        yield found
        return
    for part in found.factors if isinstance(found, Product) else found.segments:
        yield from leaves(part)


def pin(extent: Extent, reason: str, where: str = "") -> None:
    """Forbid the removal of indices from every Dim of the extent."""
    _add_pins(extent, (Pin(reason, where),))


def _add_pins(extent: Extent, pins: Iterable[Pin]) -> None:
    for dim in leaves(extent):
        for item in pins:
            if len(dim.pins) < MAX_PINS and item not in dim.pins:
                dim.pins.append(item)


def _bind(dim: Dim, target: Extent) -> None:
    """Let a free Dim stand for ``target``; a Dim inside its own target has no finite meaning and is pinned."""
    if target is dim:
        return
    if not isinstance(target, Dim) and any(leaf is dim for leaf in leaves(target)):
        pin(target, "an axis is laid out inside itself (cyclic)")
        return
    dim.bound = target
    if dim.pins:
        _add_pins(target, dim.pins)
    if isinstance(target, Dim) and not target.name:
        target.name = dim.name


def unify(a: Extent, b: Extent) -> None:
    """State that two axes always have the same indices. Raises AxisError when their sizes differ."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if not same(size_of(a), size_of(b)):
        raise AxisError(f"axes of sizes {size_of(a)} and {size_of(b)} cannot be the same: {a} and {b}")
    if isinstance(a, Dim):
        _bind(a, b)
    elif isinstance(b, Dim):
        _bind(b, a)
    elif isinstance(a, Product) and isinstance(b, Product):
        _unify_products(a, b)
    else:
        _unify_concats(
            list(a.segments) if isinstance(a, Concat) else [a], list(b.segments) if isinstance(b, Concat) else [b]
        )


def _entangle(extents: Iterable[Extent]) -> None:
    for extent in extents:
        pin(extent, "two axes overlap without a common layout (entangled)")


def _unify_products(a: Product, b: Product) -> None:
    left, right = list(a.factors), list(b.factors)
    while left and right:
        x, y = resolve(left.pop()), resolve(right.pop())
        if isinstance(x, Product):
            left.extend(x.factors)
            right.append(y)
            continue
        if isinstance(y, Product):
            right.extend(y.factors)
            left.append(x)
            continue
        if same(size_of(x), size_of(y)):
            unify(x, y)
            continue
        if divide(size_of(x), size_of(y)) is None:
            left, right, x, y = right, left, y, x
        parts = split_minor(x, size_of(y))
        if parts is None:
            _entangle([x, y, *left, *right])
            return
        left.append(parts[0])
        unify(parts[1], y)
    _entangle(rest for rest in [*left, *right] if not same(size_of(rest), 1))


def _unify_concats(left: list[Extent], right: list[Extent]) -> None:
    left.reverse()  # the next segment is popped from the end, so that long concatenations stay linear
    right.reverse()
    while left and right:
        x, y = resolve(left.pop()), resolve(right.pop())
        if isinstance(x, Concat) or isinstance(y, Concat):
            left.extend(reversed(x.segments) if isinstance(x, Concat) else (x,))
            right.extend(reversed(y.segments) if isinstance(y, Concat) else (y,))
            continue
        if same(size_of(x), size_of(y)):
            unify(x, y)
            continue
        if _shorter(size_of(x), size_of(y)):
            left, right, x, y = right, left, y, x
        parts = split_at(x, size_of(y))
        if parts is None:
            _entangle([x, y, *left, *right])
            return
        left.extend([parts[1], parts[0]])
        right.append(y)


def _shorter(a: Size, b: Size) -> bool:
    """Whether a run of ``a`` indices is certainly shorter than one of ``b``; symbols are positive."""
    difference = simplify(b - a)
    return difference > 0 if isinstance(difference, int) else bool(difference.is_positive)


def split_minor(extent: Extent, minor: Size) -> tuple[Extent, Extent] | None:
    """Refine ``extent`` into (major, minor) with the given size of the minor part, or None where it has no such layout."""
    extent = resolve(extent)
    size = size_of(extent)
    if same(minor, size):
        return ONE, extent
    if same(minor, 1):
        return extent, ONE
    quotient = divide(size, minor)
    if quotient is None:
        return None
    if isinstance(extent, Dim):
        major_part, minor_part = fresh(quotient), fresh(minor)
        _bind(extent, Product((major_part, minor_part)))
        return major_part, minor_part
    if isinstance(extent, Product):
        return _split_product_minor(extent, minor)
    return _split_concat_minor(extent, minor)


def _split_product_minor(extent: Product, minor: Size) -> tuple[Extent, Extent] | None:
    factors, taken, need = list(extent.factors), [], minor
    while not same(need, 1):
        factor = resolve(factors.pop())
        if isinstance(factor, Product):
            factors.extend(factor.factors)
            continue
        rest = divide(need, size_of(factor))
        if rest is not None:
            taken.append(factor)
            need = rest
            continue
        parts = split_minor(factor, need)
        if parts is None:
            return None
        factors.append(parts[0])
        taken.append(parts[1])
        break
    return resolve(Product(factors)), resolve(Product(tuple(reversed(taken))))


def _split_concat_minor(extent: Concat, minor: Size) -> tuple[Extent, Extent] | None:
    if any(divide(size_of(segment), minor) is None for segment in extent.segments):
        return None  # checked before anything is refined, so that a failed split leaves no trace
    majors: list[Extent] = []
    shared: Extent | None = None
    for segment in extent.segments:
        parts = split_minor(segment, minor)
        if parts is None:
            return None
        majors.append(parts[0])
        if shared is None:
            shared = parts[1]
        else:
            unify(shared, parts[1])
    return (resolve(Concat(majors)), resolve(shared)) if shared is not None else None


def split_at(extent: Extent, offset: Size) -> tuple[Extent, Extent] | None:
    """Refine ``extent`` into two segments, the first ``offset`` long, or None where it cannot be cut there."""
    extent = resolve(extent)
    size = size_of(extent)
    if same(offset, 0):
        return ZERO, extent
    if same(offset, size):
        return extent, ZERO
    if not _shorter(offset, size):
        return None
    if isinstance(extent, Dim):
        first, second = fresh(offset), fresh(simplify(size - offset))
        _bind(extent, Concat((first, second)))
        return first, second
    if isinstance(extent, Concat):
        return _split_concat_at(extent, offset)
    head, rest = extent.factors[0], extent.factors[1:]
    inner = divide(offset, product(size_of(f) for f in rest))
    parts = split_at(head, inner) if inner is not None else None
    if parts is None:
        return None
    return resolve(Product((parts[0], *rest))), resolve(Product((parts[1], *rest)))


def _split_concat_at(extent: Concat, offset: Size) -> tuple[Extent, Extent] | None:
    before: list[Extent] = []
    for position, segment in enumerate(extent.segments):
        size = size_of(segment)
        if same(offset, 0):
            return resolve(Concat(before)), resolve(Concat(extent.segments[position:]))
        if _shorter(offset, size):
            parts = split_at(segment, offset)
            if parts is None:
                return None
            after = (parts[1], *extent.segments[position + 1 :])
            return resolve(Concat((*before, parts[0]))), resolve(Concat(after))
        before.append(segment)
        offset = simplify(offset - size)
    return resolve(Concat(before)), ZERO


def pour(extents: Sequence[Extent], sizes: Sequence[Size]) -> list[Extent] | None:
    """Lay the factors of ``extents`` out as axes of the given sizes (a reshape), from the minor end.

    Returns None where some size cuts a factor that has no such layout. Equal prefixes are not treated here: see
    :func:`reshape`, which confines a failure to the axes it concerns.
    """
    pool = [resolve(e) for e in extents]
    result: list[Extent] = []
    for wanted in reversed(sizes):
        need, minor = wanted, []
        while not same(need, 1):
            if not pool:
                return None
            factor = resolve(pool.pop())
            if isinstance(factor, Product):
                pool.extend(factor.factors)
                continue
            rest = divide(need, size_of(factor))
            if rest is not None:
                minor.append(factor)
                need = rest
                continue
            parts = split_minor(factor, need)
            if parts is None:
                return None
            pool.append(parts[0])
            minor.append(parts[1])
            break
        result.append(resolve(Product(tuple(reversed(minor)))))
    return result[::-1]


def reshape(extents: Sequence[Extent], sizes: Sequence[Size], where: str = "") -> list[Extent]:
    """The extents after a reshape to ``sizes``; where no layout exists, fresh Dims, pinned on both sides.

    The axes are first grouped into the smallest runs whose products agree, so that a reshape without a common layout
    freezes only the axes it really mixes.
    """
    result: list[Extent] = []
    for old, new in _matching_runs(extents, sizes):
        poured = pour(old, new)
        if poured is None:
            for extent in old:
                pin(extent, "a reshape mixes this axis with others (entangled)", where)
            poured = [fresh(size) for size in new]
            for extent in poured:
                pin(extent, "a reshape mixes this axis with others (entangled)", where)
        result.extend(poured)
    return result


def _matching_runs(extents: Sequence[Extent], sizes: Sequence[Size]) -> list[tuple[list[Extent], list[Size]]]:
    runs: list[tuple[list[Extent], list[Size]]] = []
    i = j = 0
    while i < len(extents) or j < len(sizes):
        start_i, start_j = i, j
        left: Size = 1
        right: Size = 1
        while True:
            if i < len(extents) and (same(left, right) or _behind(left, right) or j >= len(sizes)):
                left = simplify(left * size_of(extents[i]))
                i += 1
            elif j < len(sizes):
                right = simplify(right * sizes[j])
                j += 1
            else:
                break
            if same(left, right) and not (i == len(extents)) ^ (j == len(sizes)):
                break
        runs.append((list(extents[start_i:i]), list(sizes[start_j:j])))
    return runs


def _behind(a: Size, b: Size) -> bool:
    """Whether the running product ``a`` should take the next axis before ``b`` does."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return divide(b, a) is not None


Keep = Mapping[Dim, "np.ndarray"]


def flat_indices(extent: Extent, keep: Keep) -> np.ndarray:
    """The positions on the axis that remain when each Dim of ``keep`` keeps the given (sorted) indices."""
    found = resolve(extent)
    if isinstance(found, Dim):
        kept = keep.get(found)
        return np.arange(_static(found)) if kept is None else np.asarray(kept)
    if isinstance(found, Product):
        result = np.zeros(1, dtype=np.int64)
        for factor in found.factors:
            result = (result[:, None] * _static(factor) + flat_indices(factor, keep)[None, :]).reshape(-1)
        return result
    parts, offset = [np.zeros(0, dtype=np.int64)], 0
    for segment in found.segments:
        parts.append(flat_indices(segment, keep) + offset)
        offset += _static(segment)
    return np.concatenate(parts)


def size_after(extent: Extent, keep: Keep) -> Size:
    """The size of the axis when each Dim of ``keep`` keeps the given indices; works for symbolic sizes too."""
    found = resolve(extent)
    if isinstance(found, Dim):
        kept = keep.get(found)
        return found.size if kept is None else len(kept)
    if isinstance(found, Product):
        return product(size_after(f, keep) for f in found.factors)
    return total(size_after(s, keep) for s in found.segments)


def touches(extent: Extent, keep: Keep) -> bool:
    return any(dim in keep for dim in leaves(extent))


def _static(extent: Extent) -> int:
    size = size_of(extent)
    if not isinstance(size, int):
        raise AxisError(f"axis {extent} has the dynamic size {size}: its indices cannot be listed")
    return size


def format_extent(extent: Extent) -> str:
    """``conv1.weight:0=64``, ``(h=8 d=16)``, ``(a=3 + b=5)``; a pinned Dim carries a ``!``."""
    found = resolve(extent)
    if isinstance(found, Dim):
        return f"{found.name or 'dim'}={found.size}{'!' if found.pins else ''}"
    if isinstance(found, Product):
        return "(" + " ".join(format_extent(f) for f in found.factors) + ")" if found.factors else "1"
    return "(" + " + ".join(format_extent(s) for s in found.segments) + ")" if found.segments else "0"
