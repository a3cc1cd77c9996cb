"""Contractions whose factors are stored in few bits: what is multiplied, and what scales the sums.

    sum_k x[m, k] * (q[n, k] - z[n, g]) * s[n, g]    =    sum_g s[n, g] * sum_(k in g) x[m, k] * (q[n, k] - z[n, g])

Of a factor that is a product, the ``core`` is what comes from integers of 8 bits or less, or from floats of 8 bits. The
rest are scales: constant over runs of the sum, they multiply sums instead of entries. What is left in a tile is exact
in half precision, or in the integers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.region import Region, Term, below_results, terms_below
from regauge.ir.fusion.terms import DIGITS
from regauge.ir.scalars import ROUNDED_8
from regauge.ir.sizes.expressions import is_static

FLOAT8 = tuple(ROUNDED_8)
"""Floats of 8 bits that kernels read; all are numbers of half precision, too."""

CODES = (torch.int8, torch.uint8, *FLOAT8)
"""Types of what is multiplied as it is stored."""

EXACT = 256
"""Up to here bfloat16 holds all integers."""

SHORTEST = 16
"""Indices of a run that shares a scale: with fewer, tensor cores would be left idle, and entries are scaled instead."""

LONGEST = 2**17
"""Products of two integers of 8 bits whose sum 32 bits hold."""


@dataclass(frozen=True, slots=True)
class Side:
    """A factor: its ``core``, and ``scales`` that multiply it; all of it is core where it is not of few bits."""

    core: Term
    scales: tuple[Term, ...] = ()
    few_bits: bool = False


@dataclass(frozen=True, slots=True)
class Product:
    """A contraction and its factors; ``whole``: integers of 8 bits, whose products are summed as such."""

    contraction: Term
    left: Side
    right: Side
    whole: bool = False

    @property
    def scales(self) -> tuple[Term, ...]:
        return (*self.left.scales, *self.right.scales)


@dataclass(frozen=True, slots=True)
class Products:
    """The contractions of a region, which go over the same loops: ``groups``, each index of which has scales of its
    own; ``digits``, at whose indices the same bytes are read; and the rest."""

    all: tuple[Product, ...]
    groups: frozenset[Dim]
    digits: tuple[Dim, ...]


def products_of(region: Region, part: Sequence[Term] | None = None) -> Products:
    """How the contractions of a region, or of a part of it, are computed."""
    part = region.contractions if part is None else part
    over = part[0].over
    found = [_product(contraction) for contraction in part]
    groups = frozenset(dim for one in found for scale in one.scales for dim in scale.axes & over)
    digits = [dim for one in found for side in (one.left, one.right) for dim in _digits(side)]
    inner = over - groups
    run = [dim.size for dim in inner - set(digits)]
    short = all(map(is_static, run)) and math.prod(map(int, run)) < SHORTEST
    cores = [side.core for one in found for side in (one.left, one.right)]
    if short or not groups.isdisjoint(digits) or not all(inner <= core.axes for core in cores if groups or digits):
        return plain_products(part)
    few = [side.core for one in found for side in (one.left, one.right) if side.few_bits]
    stored = {one for core in few for one in terms_below(core) if one.op == "load"}
    # what is read along the first ones is the same for all that come then
    order = sorted(dict.fromkeys(digits), key=lambda dim: -sum(dim in load.axes for load in stored))
    return Products(tuple(found), groups, tuple(order))


def plain_products(contractions: Sequence[Term]) -> Products:
    """Contractions with factors as they are: each entry is scaled before it is multiplied."""
    found = []
    for contraction in contractions:
        left, right = map(Side, _factors(contraction))
        found.append(Product(contraction, left, right))
    return Products(tuple(found), frozenset(), ())


def same_left(region: Region) -> bool:
    """Whether all contractions have the same left factor, but for scales."""
    return len({below_results(_side(_factors(contraction)[0]).core) for contraction in region.contractions}) == 1


def few_bit_sides(region: Region) -> list[tuple[bool, bool]]:
    """Of each contraction whether its left and its right factor are stored in few bits."""
    found = [_product(contraction) for contraction in region.contractions]
    return [(one.left.few_bits, one.right.few_bits) for one in found]


def _factors(contraction: Term) -> Sequence[Term]:
    return below_results(contraction.args[0]).args


def _product(contraction: Term) -> Product:
    left, right = map(_side, _factors(contraction))
    sizes = [dim.size for dim in contraction.over]
    fits = all(map(is_static, sizes)) and math.prod(map(int, sizes)) <= LONGEST
    return Product(contraction, left, right, fits and _is_int8(left.core) and _is_int8(right.core))


def _side(factor: Term) -> Side:
    parts = list(_parts(factor))
    cores = [part for part in parts if _is_core(part)]
    if len(cores) != 1:
        return Side(factor)
    return Side(codes_of(cores[0]), tuple(part for part in parts if part is not cores[0]), True)


def _parts(term: Term) -> Iterator[Term]:
    """The factors of a product, of products in it, and so on."""
    below = below_results(term)
    if below.op == "mul":
        for arg in below.args:
            yield from _parts(arg)
    else:
        yield term


def _is_core(term: Term) -> bool:
    if is_float8(term) or codes_of(term).op == "spread" or is_compact(codes_of(term)):
        return True
    ends = integer_range(term)
    return bool(term.axes) and ends is not None and max(-ends[0], ends[1]) <= EXACT


def codes_of(term: Term) -> Term:
    """What an integer or a float of 8 bits is before it is taken for a real number."""
    while term.op in ("result", "real"):
        (term,) = term.args
    return term


def is_float8(term: Term) -> bool:
    term = codes_of(term)
    return term.op == "load" and term.value.value.dtype in FLOAT8


def is_compact(term: Term) -> bool:
    """Whether a term is what is left of a tensor with zeros, which a mask lays out."""
    return term.op == "load" and any(arg.op == "rank" for arg in term.args)


def _is_int8(term: Term) -> bool:
    term = codes_of(term)
    return term.op == "load" and term.value.value.dtype == torch.int8


def integer_range(term: Term) -> tuple[int, int] | None:
    """The least and the greatest integer that a term can be; None where it may be no integer, or of more bits."""
    term = codes_of(term)
    if term.op == "load" and term.value.value.dtype in (torch.int8, torch.uint8):
        limits = torch.iinfo(term.value.value.dtype)
        return limits.min, limits.max
    if term.op == "spread":
        ranges = [integer_range(value) for value in term.args[1:]]
        known = [one for one in ranges if one is not None]
        return (min(0, *(low for low, _ in known)), max(0, *(high for _, high in known))) if known == ranges else None
    if term.op == "digit":
        whole = integer_range(term.args[0])
        return (0, term.value.base - 1) if whole is not None and whole[0] >= 0 else None
    if term.op == "number":
        return (int(term.value),) * 2 if float(term.value).is_integer() else None
    if term.op not in ("add", "sub"):
        return None
    first, second = map(integer_range, term.args)
    if first is None or second is None:
        return None
    if term.op == "sub":
        second = (-second[1], -second[0])
    return first[0] + second[0], first[1] + second[1]


def _digits(side: Side) -> Iterator[Dim]:
    stack = [side.core] if side.few_bits else []
    while stack:
        term = stack.pop()
        if term.op in DIGITS:
            yield term.value.loop
        stack += term.args
