"""Tensors as sums of products: ``y[s,o] = sum over k of x[s,k] w[o,k] + b[o]``, and what is done with them.

Every axis is a product of *indices*, major ones first, so that a reshape only splits and merges indices (OLLIE's
iterators), and a node that is read once is put into what reads it (its stages are merged).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import Size, product, same

MOST_TERMS = 12
"""Products of sums that would be more than so many products stay what they are."""

MOST_FACTORS = 10


@dataclass(frozen=True, eq=False)
class Index:
    """An index of the loops of an expression; two are equal only if they are the same."""

    size: Size


Axis: TypeAlias = tuple[Index, ...]
Axes: TypeAlias = tuple[Axis, ...]


class Outside(Exception):
    """A node, or a size, that sums of products do not say."""


@dataclass(frozen=True)
class Range:
    """A factor that is 1 where ``wide index = start + narrow index``, else 0: its axes are these two indices.

    Summed over the narrow index it puts zeros around a tensor, over the wide one it takes a part of one: a range is
    relaxed to a wider one, where the summand is zero outside, or tightened to where it is not.
    """

    start: int
    narrow: int
    wide: int


@dataclass(frozen=True)
class Window:
    """A factor that is 1 where ``wide = stride * out + dilation * tap + start``, else 0: its axes are these indices.

    Summed over wide and tap it is what a convolution reads, zeros around it where ``start`` is negative; summed
    over out and tap where a transposed convolution adds its products to. An axis of size 1 has no index.
    """

    stride: int
    dilation: int
    start: int
    wide: int
    out: int
    taps: int

    def parts(self, *, spread: bool) -> list[tuple[int, int, int]]:
        """For each tap: the first entry read that there is, and the entries of the result, from and to, that read any.

        Forwards these are of the wide and the out index; ``spread``, which is for a stride of 1, the other way round.
        """
        size, count = (self.out, self.wide) if spread else (self.wide, self.out)
        step, turn = 1 if spread else self.stride, -1 if spread else 1
        found = []
        for tap in range(self.taps):
            first = turn * (self.start + self.dilation * tap)
            low = min(count, max(0, -(first // step)))
            high = max(low, min(count, (size - 1 - first) // step + 1))
            found.append((first + step * low, low, high))
        return found


Places: TypeAlias = Range | Window
"""Factors of ones and zeros, which are never tensors: they say which index of one tensor goes with which of another."""


@dataclass(frozen=True)
class Factor:
    """A value, with the indices that each of its axes is made of; an axis of size 1 has none."""

    value: Value | Places
    axes: Axes


@dataclass(frozen=True)
class Term:
    """``scale`` times the product of factors, summed over the indices that the result does not have."""

    scale: float
    factors: tuple[Factor, ...] = ()

    @property
    def indices(self) -> set[Index]:
        return {index for factor in self.factors for axis in factor.axes for index in axis}


@dataclass(frozen=True)
class Expression:
    """A sum of terms with the axes of the result. A term without an index of the result is the same along it."""

    axes: Axes
    terms: tuple[Term, ...]

    def with_indices(self, new: Mapping[Index, Axis]) -> Expression:
        """The expression with indices replaced by others, or split into several."""

        def replaced(axes: Axes) -> Axes:
            return tuple(tuple(i for index in axis for i in new.get(index, (index,))) for axis in axes)

        if not new:
            return self
        places = [f for term in self.terms for f in term.factors if isinstance(f.value, Places)]
        ends = {index for factor in places for axis in factor.axes for index in axis}
        if any(len(axis) > 1 for index, axis in new.items() if index in ends):
            raise Outside("an index of a range or a window is split")
        terms = [
            replace(term, factors=tuple(Factor(f.value, replaced(f.axes)) for f in term.factors)) for term in self.terms
        ]
        return Expression(replaced(self.axes), tuple(terms))

    def scaled(self, by: float) -> Expression:
        return replace(self, terms=tuple(replace(term, scale=term.scale * by) for term in self.terms))


def leaf(value: Value) -> Expression:
    """A value as it is."""
    axes = tuple(() if same(size, 1) else (Index(size),) for size in value.shape)
    return Expression(axes, (Term(1.0, (Factor(value, axes),)),))


class Read(Protocol):
    """Gives the expression of an operand; ``split`` where windows beside one another are read as a split index."""

    split: bool

    def __call__(self, operand: Any, /) -> Expression: ...


# -- indices -----------------------------------------------------------------------------------------------------------


def matched(first: Axis, second: Axis) -> dict[Index, Axis]:
    """What replaces the indices of two axes so that they are the same: indices are split where one has larger ones."""
    left, right = list(first), list(second)
    new: dict[Index, Axis] = {}
    while left and right:
        a, b = left[0], right[0]
        if a is b:
            pass
        elif same(a.size, b.size):
            new[b] = (a,)
        elif _divides(b.size, a.size):
            parts = (Index(b.size), Index(a.size // b.size))
            new[a], new[b], left[0:1] = parts, parts[:1], parts
        elif _divides(a.size, b.size):
            parts = (a, Index(b.size // a.size))
            new[b], right[0:1] = parts, parts
        else:
            raise Outside(f"indices of {a.size} and {b.size} do not fit into one another")
        del left[0], right[0]
    if left or right:
        raise Outside("axes of different sizes")
    return _closed(new)


def _closed(new: dict[Index, Axis]) -> dict[Index, Axis]:
    """Replacements that hold nothing that is replaced."""

    def full(index: Index) -> Axis:
        return tuple(i for part in new[index] for i in full(part)) if index in new else (index,)

    return {index: full(index) for index in new}


def _divides(a: Size, b: Size) -> bool:
    return isinstance(a, int) and isinstance(b, int) and 1 < a < b and b % a == 0


def unified(
    first: Expression, second: Expression, pairs: Callable[[Axes, Axes], Sequence[tuple[Axis, Axis]]]
) -> tuple[Expression, Expression]:
    """Both with the same indices on pairs of axes; an axis of size 1 fits any other."""
    for place in range(len(pairs(first.axes, second.axes))):
        a, b = pairs(first.axes, second.axes)[place]
        if a and b:
            new = matched(a, b)
            first, second = first.with_indices(new), second.with_indices(new)
    return first, second


def aligned(a: Axes, b: Axes) -> list[tuple[Axis, Axis]]:
    """Axes of two shapes that are broadcast against one another."""
    count = min(len(a), len(b))
    return list(zip(a[len(a) - count :], b[len(b) - count :], strict=True))


def broadcast(a: Axes, b: Axes) -> Axes:
    """The axes of the result where two shapes are broadcast against one another."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    head = len(longer) - len(shorter)
    return (*longer[:head], *(x or y for x, y in zip(longer[head:], shorter, strict=True)))


def regrouped(expression: Expression, shape: Sequence[Size]) -> Expression:
    """The expression in another shape: indices are merged to axes, or split where one is of several axes."""
    left = [index for axis in expression.axes for index in axis]
    new: dict[Index, Axis] = {}
    axes: list[Axis] = []
    for size in shape:
        axis: list[Index] = []
        while not same(product(index.size for index in axis), size):
            if not left:
                raise Outside("a reshape whose sizes cannot be compared")
            have = product(index.size for index in axis)
            index = left.pop(0)
            wanted = size // have if isinstance(size, int) and isinstance(have, int) and size % have == 0 else None
            if wanted is not None and _divides(wanted, index.size):
                major, minor = Index(wanted), Index(index.size // wanted)
                new[index] = (major, minor)
                left.insert(0, minor)
                index = major
            axis.append(index)
        axes.append(tuple(axis))
    if left:
        raise Outside("a reshape whose sizes cannot be compared")
    return replace(expression.with_indices(_closed(new)), axes=tuple(axes))


# -- products and sums -------------------------------------------------------------------------------------------------


def few(terms: Iterable[Term]) -> None:
    """Raises Outside where a term has more factors than a search could put in order."""
    if any(len(term.factors) > MOST_FACTORS for term in terms):
        raise Outside("too many factors")


def times(first: Expression, second: Expression, axes: Axes) -> Expression:
    """The product of two expressions, summed over the indices that are not in the axes of the result."""
    if len(first.terms) * len(second.terms) > MOST_TERMS:
        raise Outside("too many terms")
    terms = [Term(a.scale * b.scale, (*a.factors, *b.factors)) for a in first.terms for b in second.terms]
    few(terms)
    return summed(Expression(axes, tuple(terms)), {i for e in (first, second) for axis in e.axes for i in axis})


def summed(expression: Expression, before: set[Index]) -> Expression:
    """The expression where indices of ``before`` are summed that it does not have; a term without one is repeated."""
    kept = {index for axis in expression.axes for index in axis}
    terms = []
    for term in expression.terms:
        times = product(index.size for index in before - kept - term.indices)
        if not isinstance(times, int):
            raise Outside("a sum over a dynamic size")
        terms.append(replace(term, scale=term.scale * times))
    return replace(expression, terms=tuple(terms))


def plus(first: Expression, second: Expression) -> Expression:
    """The sum of two expressions, broadcast against one another."""
    a, b = unified(first, second, aligned)
    if len(a.terms) + len(b.terms) > MOST_TERMS:
        raise Outside("too many terms")
    return Expression(broadcast(a.axes, b.axes), (*a.terms, *b.terms))


def in_range(x: Expression, dim: int, start: Size, size: Size, *, wider: bool, one: bool = False) -> Expression:
    """The expression with an axis of another size, times the range that says which index is which.

    Where ``one`` is allowed an axis of size 1 keeps an index, too.
    """
    if len(x.axes[dim]) != 1 or (same(size, 1) and not one):
        raise Outside("a range of several indices, or of none")
    (old,) = x.axes[dim]
    new = Index(size)
    narrow, wide = (old, new) if wider else (new, old)
    if not (isinstance(start, int) and isinstance(narrow.size, int) and isinstance(wide.size, int)):
        raise Outside("a range of a dynamic size")
    if not 0 <= start <= wide.size - narrow.size:
        raise Outside("a tensor of which something is cut off where zeros are put around it")
    factor = Factor(Range(start, narrow.size, wide.size), ((wide,), (narrow,)))
    terms = []
    for term in x.terms:
        if old in term.indices:
            terms.append(replace(term, factors=(*term.factors, factor)))
        elif wider:
            raise Outside("zeros around what is the same along the axis")
        else:
            terms.append(term)
    few(terms)
    return Expression((*x.axes[:dim], (new,), *x.axes[dim + 1 :]), tuple(terms))
