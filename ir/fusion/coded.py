"""Keys and values of attention that are stored in few bits: codes, and what scales and shifts them.

    keys[k, s]  =  code[k, s] * places[s] * heads[k]  +  sum over i of places_i[s] * heads_i[k]

What depends on places alone, or on the numbers of a head alone, commutes with sums over the other one: scales of places
multiply scores, scales of heads queries, and what is added is a sum of queries, times numbers of places. So entries are
multiplied as the small integers that they are, less their middle, which half precision holds exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.products import FLOAT8, codes_of, integer_range
from regauge.ir.fusion.region import Term, below_results, terms_below

MOST_PARTS = 8
"""Products that a factor may be the sum of."""

Terms = tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Shift:
    """What is added to codes: the sum of products over ``places``, times the product of ``heads``."""

    places: tuple[Terms, ...]
    heads: Terms


@dataclass(frozen=True, slots=True)
class Coded:
    """A factor that is a ``code``, an integer of 8 bits or less or a float of 8 bits, less ``middle``, times what has
    only ``places``, times what has only numbers of ``heads``, and more by ``shifts``."""

    code: Term
    middle: int
    places: Terms
    heads: Terms
    shifts: tuple[Shift, ...]

    @property
    def digits(self) -> int:
        """How many codes a byte holds."""
        return self.code.value.count if self.code.op == "digit" else 1


def coded(factor: Term, source: frozenset[Dim], head: frozenset[Dim]) -> Coded | None:
    """How keys, or values, are made of codes; None where they are not, or other numbers stand between, or a head has
    one number."""
    parts = list(_parts(factor))
    ofs = [part for part in parts if part[0] is not None]
    if not head or len(ofs) != 1 or len(parts) > MOST_PARTS:
        return None
    ((code, scales),) = ofs
    assert code is not None
    if not source <= code.axes or not head <= code.axes or code.op == "digit" and not _is_last(code, head):
        return None
    if any(scale.axes & source and scale.axes & head for _, product in parts for scale in product):
        return None  # as where groups of numbers have a scale for each place
    middle = _middle(code)
    added = [product for part, product in parts if part is None]
    added += [(*scales, Term("number", value=float(middle)))] if middle else []
    shifts: dict[Terms, list[Terms]] = {}
    for product in added:
        heads = tuple(term for term in product if not _is_of_place(term, source))
        shifts.setdefault(heads, []).append(tuple(term for term in product if _is_of_place(term, source)))
    return Coded(
        code,
        middle,
        tuple(scale for scale in scales if scale.axes & source),
        tuple(scale for scale in scales if not scale.axes & source),
        tuple(Shift(tuple(places), heads) for heads, places in shifts.items()),
    )


def _is_of_place(term: Term, source: frozenset[Dim]) -> bool:
    return bool(term.axes & source) or term.op == "number"


def _is_last(digit: Term, head: frozenset[Dim]) -> bool:
    """Whether digits lie one behind the other along a head, and bytes hold nothing else."""
    return digit.args[0].op == "load" and digit.value.loop in head and 256 == digit.value.base**digit.value.count


def _middle(code: Term) -> int:
    ends = integer_range(code)
    return 0 if ends is None else (ends[0] + ends[1] + 1) // 2


def _parts(term: Term) -> Iterator[tuple[Term | None, Terms]]:
    """The products that a term is the sum of: the code that each has, if any, and its other factors."""
    term = below_results(term)
    if is_code(term):
        yield codes_of(term), ()
    elif not any(map(is_code, terms_below(term))):
        yield None, (term,)
    elif term.op == "mul":
        for code, factors in _parts(term.args[0]):
            for other, more in _parts(term.args[1]):
                yield (code or other, (*factors, *more)) if code is None or other is None else (None, (term,))
    elif term.op == "add" or term.op == "sub":
        yield from _parts(term.args[0])
        minus = (Term("number", value=-1.0),) * (term.op == "sub")
        for code, factors in _parts(term.args[1]):
            yield code, (*factors, *minus)
    else:
        yield None, (term,)


def is_code(term: Term) -> bool:
    term = codes_of(term)
    if term.op == "digit":
        return is_code(term.args[0])
    return term.op == "load" and bool(term.axes) and term.value.value.dtype in (torch.int8, torch.uint8, *FLOAT8)
