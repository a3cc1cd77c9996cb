"""Unification of extents, and the refinements it is made of: splitting an axis by a minor size or at an offset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import TypeAlias

from regauge.ir.dims.extents import ONE, ZERO, Concat, Dim, Extent, Product, bind, fresh, pin, resolve, size_of
from regauge.ir.errors import AxisError
from regauge.ir.sizes.expressions import Size, divide, may_be_same, same, simplify, total

MOST_PIECES = 16  # a concatenation is cut into so many equal pieces at most; more would leave little to cut in each


def unify(a: Extent, b: Extent) -> None:
    """State that two axes always have the same indices. Raises AxisError when their sizes differ for all inputs.

    Dynamic sizes that may be equal or not (two batch sizes of different names) leave the axes apart, and pinned.
    """
    if a is b:
        return
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if isinstance(a, Dim) and isinstance(b, Dim) and a.size == b.size:
        bind(a, b)
        return
    if not same(size_of(a), size_of(b)):
        if may_be_same(size_of(a), size_of(b)):
            pin(a, "its size is equal to another only for some inputs")
            pin(b, "its size is equal to another only for some inputs")
            return
        raise AxisError(f"axes of sizes {size_of(a)} and {size_of(b)} cannot be the same: {a} and {b}")
    if isinstance(a, Dim):
        bind(a, b)
    elif isinstance(b, Dim):
        bind(b, a)
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
    left: list[Extent] = list(a.factors)
    right: list[Extent] = list(b.factors)
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
        parts = None if _shifted(x, y, right) else split_at(x, size_of(y))
        if parts is None:
            _entangle([x, y, *left, *right])
            return
        left.extend([parts[1], parts[0]])
        right.append(y)


def _shifted(axis: Extent, by: Extent, other: Iterable[Extent]) -> bool:
    """Whether an axis meets itself a few indices on: its pieces would all be one, nested as deep as they are many.

    ``x[1:] - x[:-1]`` ties every index to its neighbour.
    """
    size, step = size_of(axis), size_of(by)
    many = not isinstance(size, int) or not isinstance(step, int) or size > MOST_PIECES * step
    return many and any(resolve(segment) is axis for segment in other)


def _shorter(a: Size, b: Size) -> bool:
    """Whether a run of ``a`` indices is certainly shorter than one of ``b``; symbols are positive."""
    difference = simplify(b - a)
    return difference > 0 if isinstance(difference, int) else bool(difference.is_positive)


def split_minor(extent: Extent, minor: Size) -> tuple[Extent, Extent] | None:
    """Refine ``extent`` into (major, minor), the minor part of the given size; None where it has no such layout."""
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
        bind(extent, Product((major_part, minor_part)))
        return major_part, minor_part
    if isinstance(extent, Product):
        return _split_product_minor(extent, minor)
    return _split_concat_minor(extent, minor)


def _split_product_minor(extent: Product, minor: Size) -> tuple[Extent, Extent] | None:
    factors = list(extent.factors)
    taken = _take_minor(factors, minor)
    return None if taken is None else (resolve(Product(factors)), taken)


def _take_minor(factors: list[Extent], need: Size) -> Extent | None:
    """Take the product of size ``need`` off the minor end of ``factors``; None where a factor has no such layout."""
    taken: list[Extent] = []
    while not same(need, 1):
        if not factors:
            return None
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
    return resolve(Product(tuple(reversed(taken))))


def _split_concat_minor(extent: Concat, minor: Size) -> tuple[Extent, Extent] | None:
    """Every segment gives its own major part; the minor part is one and the same."""
    runs = _whole_runs(extent.segments, minor)
    if runs is None:
        return None  # found out before anything is refined, so that a failed split leaves no trace
    majors: list[Extent] = []
    shared: Extent | None = None
    for run in runs:
        parts = _minor_parts(run, minor)
        if parts is None:
            return None
        for major, part in parts:
            majors.append(major)
            if shared is None:
                shared = part
            else:
                unify(shared, part)
    return (resolve(Concat(majors)), resolve(shared)) if shared is not None else None


def _whole_runs(segments: Sequence[Extent], minor: Size) -> list[Extent] | None:
    """Neighbouring segments gathered into the shortest runs whose lengths are multiples of ``minor``."""
    runs: list[Extent] = []
    open_run: list[Extent] = []
    for segment in segments:
        open_run.append(segment)
        if divide(total(size_of(s) for s in open_run), minor) is not None:
            runs.append(resolve(Concat(open_run)))
            open_run = []
    return None if open_run else runs


def _minor_parts(run: Extent, minor: Size) -> list[tuple[Extent, Extent]] | None:
    """One (major, minor) for a run of one segment; a run of several is cut into pieces of ``minor``, one entry each."""
    if not isinstance(run, Concat):
        parts = split_minor(run, minor)
        return None if parts is None else [parts]
    count = divide(size_of(run), minor)
    if not isinstance(count, int) or count > MOST_PIECES:
        return None
    pieces: list[tuple[Extent, Extent]] = []
    for _ in range(count):
        cut = split_at(run, minor)
        if cut is None:
            return None
        pieces.append((ONE, cut[0]))
        run = cut[1]
    return pieces


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
        bind(extent, Concat((first, second)))
        return first, second
    if isinstance(extent, Concat):
        return _split_concat_at(extent, offset)
    head, rest = extent.factors[0], Product(extent.factors[1:])
    inner = divide(offset, size_of(rest))
    if inner is None:
        return _split_inside(head, rest, offset)
    parts = split_at(head, inner)
    if parts is None:
        return None
    return resolve(Product((parts[0], rest))), resolve(Product((parts[1], rest)))


def _split_inside(head: Extent, rest: Extent, offset: Size) -> tuple[Extent, Extent] | None:
    """Cut ``(head rest)`` between two multiples of ``rest``: head becomes (a + 1 + b), and the entry between is cut.

    ShuffleNet halves channels that earlier shuffles have interleaved: the entry in the middle stays, others are free.
    """
    block = size_of(rest)
    if not isinstance(offset, int) or not isinstance(block, int):
        return None
    middle = split_at(rest, offset % block)
    parts = split_at(head, offset // block) if middle is not None else None
    tail = split_at(parts[1], 1) if parts is not None else None
    if middle is None or parts is None or tail is None:
        return None
    first = Concat((Product((parts[0], rest)), Product((tail[0], middle[0]))))
    second = Concat((Product((tail[0], middle[1])), Product((tail[1], rest))))
    return resolve(first), resolve(second)


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
    for size in reversed(sizes):
        taken = _take_minor(pool, size)
        if taken is None:
            return None
        result.append(taken)
    return result[::-1]


def reshape(extents: Sequence[Extent], sizes: Sequence[Size], pin: Callable[[Extent, str], None] = pin) -> list[Extent]:
    """The extents after a reshape to ``sizes``; where no layout exists, fresh Dims, pinned on both sides by ``pin``.

    Equal axes in front and behind stay; the rest is grouped into the smallest runs whose products agree, so that a
    reshape without a common layout freezes only the axes it really mixes.
    """
    count = min(len(extents), len(sizes))
    front = behind = 0
    while front < count and size_of(extents[front]) == sizes[front]:
        front += 1
    while behind < count - front and size_of(extents[-1 - behind]) == sizes[-1 - behind]:
        behind += 1
    end = len(extents) - behind
    result = list(extents[:front])
    for old, new in _matching_runs(extents[front:end], sizes[front : len(sizes) - behind]):
        poured = pour(old, new) if 0 in sizes else _pour_run(old, new)
        if poured is None:
            for extent in old:
                pin(extent, "a reshape mixes this axis with others (entangled)")
            poured = [fresh(size) for size in new]
            for extent in poured:
                pin(extent, "a reshape mixes this axis with others (entangled)")
        result.extend(poured)
    result.extend(extents[end:])
    return result


def _pour_run(old: Sequence[Extent], new: Sequence[Size]) -> list[Extent] | None:
    """:func:`pour`, with short ways for axes that are joined, and for one that is free or laid out as asked already."""
    if len(new) == 1:
        return [resolve(Product(old) if len(old) != 1 else old[0])]
    if len(old) == 1:
        whole = resolve(old[0])
        if isinstance(whole, Product) and [size_of(factor) for factor in whole.factors] == list(new):
            return list(whole.factors)
        if isinstance(whole, Dim) and all([type(size) is int and size > 1 for size in new]):
            if prod(new) == whole.size:
                parts = [fresh(size) for size in new]
                bind(whole, Product(parts))
                return parts
    return pour(old, new)


Runs: TypeAlias = list[tuple[Sequence[Extent], Sequence[Size]]]


def _matching_runs(extents: Sequence[Extent], sizes: Sequence[Size]) -> Runs:
    """The smallest runs of axes before and after whose products agree."""
    if len(extents) <= 1 or len(sizes) == 1:
        return [(extents, sizes)] if extents or sizes else []
    before = [size_of(extent) for extent in extents]
    if all([type(size) is int and size > 0 for size in (*before, *sizes)]):
        found = _matching_whole_runs(before, sizes)
        if found is not None:
            return [(extents[i:k], sizes[j:m]) for i, k, j, m in found]
    return _matching_symbolic_runs(extents, sizes)


def _matching_whole_runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int, int, int]] | None:
    """Runs of axes whose sizes are numbers, each as (start, end) before and (start, end) after; None where none fit."""
    runs = []
    i = j = 0
    while i < len(before) and j < len(after):
        k, m, left, right = i + 1, j + 1, before[i], after[j]
        while left != right:
            if left < right:
                if k == len(before):
                    return None
                left *= before[k]
                k += 1
            else:
                if m == len(after):
                    return None
                right *= after[m]
                m += 1
        if k == len(before) or m == len(after):  # axes of size one at the end
            k, m = len(before), len(after)
        runs.append((i, k, j, m))
        i, j = k, m
    return runs


def _matching_symbolic_runs(extents: Sequence[Extent], sizes: Sequence[Size]) -> Runs:
    runs: Runs = []
    i = j = 0
    while i < len(extents) or j < len(sizes):
        start_i, start_j = i, j
        if i < len(extents) and j < len(sizes) and size_of(extents[i]) == sizes[j]:  # an axis that stays as it is
            i, j = i + 1, j + 1
            runs.append(([extents[start_i]], [sizes[start_j]]))
            continue
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
