"""Tensors as sums of products: ``y[s,o] = sum over k of x[s,k] w[o,k] + b[o]``, read off the nodes of a graph.

Every axis is a product of *indices*, major ones first, so that a reshape only splits and merges indices (OLLIE's
iterators), and a node that is read once is put into what reads it (its stages are merged).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from regauge.ir.graph import Node, Value
from regauge.ir.ops.einsum import DOTS, explicit_equation, terms_of
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
class Factor:
    """A value, with the indices that each of its axes is made of; an axis of size 1 has none."""

    value: Value | Range
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
        ends = {i for term in self.terms for f in term.factors if isinstance(f.value, Range) for (i,) in f.axes}
        if any(len(axis) > 1 for index, axis in new.items() if index in ends):
            raise Outside("an index whose range is another one is split")
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


# -- indices -----------------------------------------------------------------------------------------------------------


def _matched(first: Axis, second: Axis) -> dict[Index, Axis]:
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


def _unified(
    first: Expression, second: Expression, pairs: Callable[[Axes, Axes], Sequence[tuple[Axis, Axis]]]
) -> tuple[Expression, Expression]:
    """Both with the same indices on pairs of axes; an axis of size 1 fits any other."""
    for place in range(len(pairs(first.axes, second.axes))):
        a, b = pairs(first.axes, second.axes)[place]
        if a and b:
            new = _matched(a, b)
            first, second = first.with_indices(new), second.with_indices(new)
    return first, second


def _aligned(a: Axes, b: Axes) -> list[tuple[Axis, Axis]]:
    """Axes of two shapes that are broadcast against one another."""
    count = min(len(a), len(b))
    return list(zip(a[len(a) - count :], b[len(b) - count :], strict=True))


def _broadcast(a: Axes, b: Axes) -> Axes:
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


def _times(first: Expression, second: Expression, axes: Axes) -> Expression:
    """The product of two expressions, summed over the indices that are not in the axes of the result."""
    if len(first.terms) * len(second.terms) > MOST_TERMS:
        raise Outside("too many terms")
    terms = [Term(a.scale * b.scale, (*a.factors, *b.factors)) for a in first.terms for b in second.terms]
    if any(len(term.factors) > MOST_FACTORS for term in terms):
        raise Outside("too many factors")
    return _summed(Expression(axes, tuple(terms)), {i for e in (first, second) for axis in e.axes for i in axis})


def _summed(expression: Expression, before: set[Index]) -> Expression:
    """The expression where indices of ``before`` are summed that it does not have; a term without one is repeated."""
    kept = {index for axis in expression.axes for index in axis}
    terms = []
    for term in expression.terms:
        times = product(index.size for index in before - kept - term.indices)
        if not isinstance(times, int):
            raise Outside("a sum over a dynamic size")
        terms.append(replace(term, scale=term.scale * times))
    return replace(expression, terms=tuple(terms))


def _number(operand: Any) -> float:
    if isinstance(operand, Value) or isinstance(operand, bool) or not isinstance(operand, int | float):
        raise Outside("not a number")
    return float(operand)


Read: TypeAlias = Callable[[Any], Expression]


def _matmul(node: Node, read: Read) -> Expression:
    x, y = map(read, node.inputs)
    if len(x.axes) < 2 or len(y.axes) < 2:
        raise Outside("a vector")
    x, y = _unified(x, y, lambda a, b: [(a[-1], b[-2]), *_aligned(a[:-2], b[:-2])])
    return _times(x, y, (*_broadcast(x.axes[:-2], y.axes[:-2]), x.axes[-2], y.axes[-1]))


def _linear(node: Node, read: Read) -> Expression:
    x, weight = read(node.inputs[0]), read(node.inputs[1])
    x, weight = _unified(x, weight, lambda a, b: [(a[-1], b[-1])])
    result = _times(x, weight, (*x.axes[:-1], weight.axes[0]))
    return _plus(result, read(node.inputs[2])) if len(node.inputs) > 2 and node.inputs[2] is not None else result


def _conv(node: Node, read: Read) -> Expression:
    """A convolution with one tap is a product over channels."""
    attributes, weight = node.attributes, node.inputs[1]
    taps = isinstance(weight, Value) and all(same(size, 1) for size in weight.shape[2:])
    plain = all(s == 1 for s in attributes["stride"]) and not any(attributes["padding"])
    if not taps or not plain or attributes.get("groups", 1) != 1:
        raise Outside("a convolution with several taps, strides or groups")
    x, w = _unified(read(node.inputs[0]), read(weight), lambda a, b: [(a[1], b[1])])
    result = _times(x, w, (x.axes[0], w.axes[0], *x.axes[2:]))
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return result
    bias = read(node.inputs[2])
    return _plus(result, replace(bias, axes=(*bias.axes, *((),) * (len(x.axes) - 2))))


def _einsum(node: Node, read: Read) -> Expression:
    operands, result = terms_of(explicit_equation(node.attributes["equation"]))
    if any(DOTS in term or len(set(term)) < len(term) for term in (*operands, result)):
        raise Outside("an einsum with an ellipsis or a diagonal")
    known, letters = read(node.inputs[0]), operands[0]
    for operand, term in zip(node.inputs[1:], operands[1:], strict=True):
        other = read(operand)

        def shared(a: Axes, b: Axes, letters: str = letters, term: str = term) -> list[tuple[Axis, Axis]]:
            return [(a[letters.index(letter)], b[term.index(letter)]) for letter in term if letter in letters]

        known, other = _unified(known, other, shared)
        axes = {**dict(zip(term, other.axes, strict=True))}
        axes |= {letter: axis or axes.get(letter, ()) for letter, axis in zip(letters, known.axes, strict=True)}
        letters = "".join(dict.fromkeys(letters + term))
        known = _times(known, other, tuple(axes[letter] for letter in letters))
    given = dict(zip(letters, known.axes, strict=True))
    before = {index for axis in known.axes for index in axis}
    return _summed(replace(known, axes=tuple(given[letter] for letter in result)), before)


def _mul(node: Node, read: Read) -> Expression:
    x, y = node.inputs
    if not isinstance(x, Value) or not isinstance(y, Value):
        return read(x).scaled(_number(y)) if isinstance(x, Value) else read(y).scaled(_number(x))
    a, b = _unified(read(x), read(y), _aligned)
    return _times(a, b, _broadcast(a.axes, b.axes))


def _plus(first: Expression, second: Expression) -> Expression:
    a, b = _unified(first, second, _aligned)
    if len(a.terms) + len(b.terms) > MOST_TERMS:
        raise Outside("too many terms")
    return Expression(_broadcast(a.axes, b.axes), (*a.terms, *b.terms))


def _add(node: Node, read: Read) -> Expression:
    x, y = map(read, node.inputs)
    return _plus(x, y)


def _sub(node: Node, read: Read) -> Expression:
    x, y = map(read, node.inputs)
    return _plus(x, y.scaled(-1.0))


def _reduced(node: Node, read: Read) -> Expression:
    x, dims = read(node.inputs[0]), node.attributes["dims"]
    rank = len(x.axes)
    gone = set(range(rank)) if dims is None else {dim % rank for dim in dims}
    keep = node.attributes["keepdim"]
    axes = [() if i in gone else axis for i, axis in enumerate(x.axes) if keep or i not in gone]
    return _summed(replace(x, axes=tuple(axes)), {index for axis in x.axes for index in axis})


def _shaped(node: Node, read: Read) -> Expression:
    return regrouped(read(node.inputs[0]), node.output.shape)


def _permuted(node: Node, read: Read) -> Expression:
    x = read(node.inputs[0])
    return replace(x, axes=tuple(x.axes[dim] for dim in node.attributes["dims"]))


def _padded(node: Node, read: Read) -> Expression:
    """Zeros around a tensor: a sum over the narrow range of each axis."""
    pads, x = node.attributes["pads"], read(node.inputs[0])
    if node.attributes["mode"] != "constant" or node.attributes["value"] != 0:
        raise Outside("what is around a tensor is not zero")
    for dim, (before, after) in enumerate(pads):
        if before or after:
            x = _in_range(x, dim, before, node.output.shape[dim], wider=True)
    return x


def _sliced(node: Node, read: Read) -> Expression:
    """A part of a tensor: a sum over the wide range, in which all else is multiplied by zero."""
    dim, start, step = (node.attributes[name] for name in ("dim", "start", "step"))
    if step != 1:
        raise Outside("a slice with steps")
    return _in_range(read(node.inputs[0]), dim, start, node.output.shape[dim], wider=False)


def _in_range(x: Expression, dim: int, start: Size, size: Size, *, wider: bool) -> Expression:
    """The expression with an axis of another size, times the range that says which index is which."""
    if len(x.axes[dim]) != 1 or same(size, 1):
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
    if any(len(term.factors) > MOST_FACTORS for term in terms):
        raise Outside("too many factors")
    return Expression((*x.axes[:dim], (new,), *x.axes[dim + 1 :]), tuple(terms))


RANGES: Mapping[str, Callable[[Node, Read], Expression]] = {"pad": _padded, "slice": _sliced}
"""What is one of its operand with other ranges of indices."""

READERS: Mapping[str, Callable[[Node, Read], Expression]] = {
    "matmul": _matmul,
    "linear": _linear,
    "conv": _conv,
    "einsum": _einsum,
    "mul": _mul,
    "add": _add,
    "sub": _sub,
    "neg": lambda node, read: read(node.inputs[0]).scaled(-1.0),
    "div": lambda node, read: read(node.inputs[0]).scaled(1.0 / _number(node.inputs[1])),
    "sum": _reduced,
    "reshape": _shaped,
    "unsqueeze": _shaped,
    "squeeze": _shaped,
    "permute": _permuted,
    "identity": lambda node, read: read(node.inputs[0]),
    **RANGES,
}
"""What is a sum of products of its operands, and how it is read."""
