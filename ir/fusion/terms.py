"""Scalar expressions over loops, which regions are made of, and the same expressions at other places of their loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from regauge.ir.affine import Affine, index_of
from regauge.ir.dims.extents import Dim
from regauge.ir.errors import FusionError
from regauge.ir.graph import Value
from regauge.ir.scalars import REDUCTIONS

MOST_TERMS = 2000
"""Terms that are computed at other places: slices of sums of slices are as many as there are paths to what is read."""

DIGITS = ("digit", "spread")
"""Terms whose :class:`Digit` says along which loop a number is taken apart."""

PLACES = ("index", "from_end")
"""Terms that are a place along an axis, an integer."""

BITS = ("rank", "bit")
"""Terms whose :class:`Digit` says along which loop the bits of a mask lie: all of these are computed with integers."""

Layout: TypeAlias = tuple[tuple[Dim, ...], ...]
"""For each axis of a tensor the loops that it is made of, the slowest first; none for an axis of size 1."""


@dataclass(frozen=True, eq=False, slots=True)
class Term:
    """A number for each index of its loops ``axes``.

    ``op`` is a primitive or a reduction of :mod:`regauge.ir.scalars`, with ``args``, or one of

    ``number``  ``value`` is the number
    ``count``   how many indices the loops ``over`` have together
    ``index``   the place along an axis that is made of the loops ``value``, the slowest first
    ``from_end``  the same, counted from the end of the axis: -1 is the last place
    ``load``    what a tensor from outside the region holds, and zero where one of ``args`` is not true; ``value`` is a
                :class:`Load`
    ``inside``  whether a place is on an axis: ``value`` is the place and the length of the axis, both Affine
    ``result``  what a node gives: its argument, as a number of the type of ``value``, a graph Value
    ``digit``   of its argument, an integer, one digit; ``value`` is a :class:`Digit`
    ``spread``  where a bit of the first argument is set, the one of the others whose number is how many bits are set
                below, and else 0; ``value`` is a :class:`Digit`, to the base 2
    ``rank``    the first argument and how many bits of the second one are set below, an integer that picks an entry;
                ``value`` is a :class:`Digit`, to the base 2
    ``bit``     whether a bit of its argument is set; ``value`` is a :class:`Digit`, to the base 2
    """

    op: str
    args: tuple[Term, ...] = ()
    axes: frozenset[Dim] = frozenset()
    value: Any = None
    over: frozenset[Dim] = frozenset()

    @property
    def reduces(self) -> bool:
        return self.op in REDUCTIONS and bool(self.over)


@dataclass(frozen=True, slots=True)
class Digit:
    """The digit to a ``base`` at the index of a ``loop`` of ``count`` indices; the least digit is the first."""

    base: int
    loop: Dim
    count: int


@dataclass(frozen=True, slots=True)
class Load:
    """A tensor from outside that the region reads, and the loops of its axes.

    Of ``moved`` ones the index is a place that depends on other loops. Of ``picked`` ones it is a number that another
    tensor holds: of the arguments of the term as many as there are picked ones are these numbers, before all guards.
    """

    value: Value
    layout: Layout
    moved: tuple[tuple[Dim, Affine], ...] = ()
    picked: tuple[Dim, ...] = ()

    @property
    def places(self) -> dict[Dim, Affine]:
        """The index that each loop of the tensor has, in the order of its axes; without what is picked."""
        moved = dict(self.moved)
        dims = [dim for axis in self.layout for dim in axis if dim not in self.picked]
        return {dim: moved.get(dim) or index_of(dim) for dim in dims}

    @property
    def loops(self) -> list[Dim]:
        """The loops that it is read along."""
        return list(dict.fromkeys(dim for place in self.places.values() for dim, _ in place.steps))


def below_results(term: Term) -> Term:
    while term.op == "result":
        (term,) = term.args
    return term


def terms_below(term: Term) -> set[Term]:
    """The terms that a term is computed from."""
    found: set[Term] = set()
    stack = list(term.args)
    while stack:
        one = stack.pop()
        if one not in found:
            found.add(one)
            stack.extend(one.args)
    return found


class Mover:
    """Makes terms at other places; what is the same is made once. ``loads`` are all that were made, in order."""

    def __init__(self) -> None:
        self.loads: list[Term] = []
        self._loads: dict[Any, Term] = {}
        self._keys: dict[Term, Any] = {}
        self._insides: dict[tuple[Affine, Affine], Term] = {}
        self._moved: dict[Any, Term] = {}

    def load(self, key: Any, load: Load, args: tuple[Term, ...] = ()) -> Term:
        """What a tensor holds; ``key`` stands for the tensor."""
        known = (key, load.moved, load.picked, args)
        if known not in self._loads:
            axes = frozenset(load.loops).union(*(arg.axes for arg in args))
            made = self._loads[known] = Term("load", args, axes, load)
            self._keys[made] = key
            self.loads.append(made)
        return self._loads[known]

    def picked(self, term: Term, dim: Dim, index: Term) -> Term:
        """What a tensor holds where the index of one of its loops is a number that is read."""
        term, index = below_results(term), below_results(index)
        if term.op != "load" or term.args or index.op != "load":
            raise FusionError("it would look up entries of what it computes, or by numbers that it computes")
        load: Load = term.value
        moved = tuple((own, place) for own, place in load.moved if own is not dim)
        return self.load(self._keys[term], Load(load.value, load.layout, moved, (dim,)), (index,))

    def compact(self, values: Term, dim: Dim, rank: Term, bit: Term) -> Term:
        """What a tensor holds where the index of its loop is a rank, and a bit is set."""
        values = below_results(values)
        if values.op != "load" or values.args:
            raise FusionError("it would look up entries of what it computes")
        load: Load = values.value
        return self.load(self._keys[values], Load(load.value, load.layout, picked=(dim,)), (rank, bit))

    def inside(self, place: Affine, length: Affine) -> Term:
        """Whether a place is on an axis."""
        if (place, length) not in self._insides:
            self._insides[place, length] = Term("inside", (), place.dims, (place, length))
        return self._insides[place, length]

    def chosen(self, condition: Term, term: Term, otherwise: Term) -> Term:
        """One of two terms; a tensor that is only read where the condition holds has zeros elsewhere by itself."""
        zero = otherwise.op == "number" and otherwise.value == 0
        if (
            zero
            and term.op == "load"
            and term.value.value.dtype.is_floating_point
            and _all_of(condition) <= {*term.args}
        ):
            return term
        return Term("where", (condition, term, otherwise), condition.axes | term.axes | otherwise.axes)

    def moved(self, term: Term, places: Mapping[Dim, Affine], guards: Mapping[Dim, Term]) -> Term:
        """The term where loops have the indices ``places``; tensors are read where the guards of these loops hold."""
        places = {dim: place for dim, place in places.items() if dim in term.axes}
        if not places:
            return term
        key = (term, frozenset(places.items()), frozenset(guards.items()))
        if key not in self._moved:
            if len(self._moved) >= MOST_TERMS:
                raise FusionError(f"it would compute more than {MOST_TERMS} terms at other places")
            self._moved[key] = self._made(term, places, guards)
        return self._moved[key]

    def _made(self, term: Term, places: Mapping[Dim, Affine], guards: Mapping[Dim, Term]) -> Term:
        if term.op == "inside":
            place, length = term.value
            return self.inside(place.at(places), length)
        if term.op in PLACES:
            raise FusionError("it would read a place along an axis elsewhere")
        if term.over & frozenset(dim for place in places.values() for dim in place.dims):
            raise FusionError("it would read what is reduced elsewhere along the same axis")
        args = tuple(
            self.moved(arg, {d: p for d, p in places.items() if d not in term.over}, guards) for arg in term.args
        )
        if term.op == "load":
            load: Load = term.value
            moved = tuple((dim, place.at(places)) for dim, place in load.places.items())
            moved = tuple((dim, place) for dim, place in moved if place != index_of(dim))
            args += tuple(guard for dim, guard in guards.items() if dim in places)
            return self.load(
                self._keys[term], Load(load.value, load.layout, moved, load.picked), tuple(dict.fromkeys(args))
            )
        axes = frozenset(dim for arg in args for dim in arg.axes) - term.over
        if term.op in (*DIGITS, *BITS):
            if term.value.loop in places:
                raise FusionError("it would read the digits of numbers elsewhere")
            axes |= {term.value.loop}
        return Term(term.op, args, axes, term.value, term.over)


def _all_of(condition: Term) -> set[Term]:
    """The terms that have to be true where a condition holds."""
    if condition.op == "logical_and":
        return {one for arg in condition.args for one in _all_of(arg)}
    return {condition}
