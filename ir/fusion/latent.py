"""Keys and values of attention that are made of latents of low rank: products of weights with latents.

    keys[k, s]  =  sum over i of scales_i[k, s] * (sum over r of weights_i[k, r] * latents[r, s])

What is linear in a product goes into its weight: rotary halves that are swapped and negated are a product with swapped
and negated rows of the weight, which every place has in common. So a tile of latents is read once, multiplied by each
weight, and the products are scaled (by cosines and sines of places) and added up (Chang et al. 2024, Palu, section 3.3:
keys are computed from latents where scores are).

    mixed[m, n]  =  sum over r of weights[n, r] * (sum over s of shares[m, s] * latents[s, r])

Values need not be computed: where their weight has no places, latents are mixed in place of them, and the mixture is
multiplied by it once (section 3.1 there puts the weight into that of the output, which then has all heads' ranks).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from regauge.ir.dims.extents import Dim
from regauge.ir.errors import FusionError
from regauge.ir.fusion.region import Term, below_results, terms_below

MOST_PRODUCTS = 3
"""Products with the same latents: a program has a tile of each in registers."""

_REASON = "its keys or values are computed by products, and not as sums of products of the same latents"


@dataclass(frozen=True, slots=True)
class Part:
    """A product of a ``weight`` with latents, times ``scales``; without a weight what is added to products."""

    scales: tuple[Term, ...]
    weight: Term | None


@dataclass(frozen=True, slots=True)
class Latents:
    """Keys, or values, as sums of ``parts``: products with ``latents``, which are summed ``over`` their rank."""

    latents: Term
    over: frozenset[Dim]
    parts: tuple[Part, ...]

    @property
    def products(self) -> list[Part]:
        return [part for part in self.parts if part.weight is not None]


@dataclass(frozen=True, slots=True)
class Mixed:
    """Values as one product of a ``weight`` with ``latents``, times ``scales``, and more by products (``shifts``): but
    for the latents nothing differs by place, and they are summed ``over`` their rank behind the sum over places."""

    latents: Term
    over: frozenset[Dim]
    weight: Term
    scales: tuple[Term, ...]
    shifts: tuple[tuple[Term, ...], ...]


def mixed_latents(values: Term, source: frozenset[Dim], columns: frozenset[Dim]) -> Mixed | None:
    """How values are made of latents that may be mixed in place of them; None where no product makes them.

    Raises FusionError with the reason where products do whose latents may not.
    """
    made = latents_of(values, source)
    if made is None:
        return None
    (first, *others) = made.products
    if others or any(scale.axes & source for part in made.parts for scale in part.scales):
        raise FusionError("its values are computed by products, and scaled by place")
    if made.latents.axes & columns:
        raise FusionError("its values are computed by products with latents of their own")
    assert first.weight is not None
    shifts = tuple(part.scales for part in made.parts if part.weight is None)
    return Mixed(made.latents, made.over, first.weight, first.scales, shifts)


def latents_of(keys: Term, source: frozenset[Dim]) -> Latents | None:
    """How keys, or values, are made of latents that have the places ``source``; None where no product makes them.

    Raises FusionError with the reason where other products do.
    """
    sums = [term for term in (below_results(keys), *terms_below(keys)) if term.reduces]
    if not sums:
        return None
    found = [(_taken_apart(term, source), term.over) for term in sums]
    latents, over = found[0][0][0], found[0][1]
    if any(one is not latents or others != over for (one, _), others in found):
        raise FusionError(_REASON)
    parts = _together(_parts(keys, source))
    made = Latents(latents, over, tuple(parts))
    if not 0 < len(made.products) <= MOST_PRODUCTS:
        raise FusionError(_REASON)
    return made


def _taken_apart(product_sum: Term, source: frozenset[Dim]) -> tuple[Term, Term]:
    """The latents and the weight of a sum of products."""
    product = below_results(product_sum.args[0])
    if product_sum.op != "sum" or product.op != "mul":
        raise FusionError(_REASON)
    latents = [arg for arg in product.args if arg.axes & source]
    weights = [arg for arg in product.args if not arg.axes & source]
    if len(latents) != 1 or any(not product_sum.over <= arg.axes for arg in product.args) or _sums(product):
        raise FusionError(_REASON)
    return below_results(latents[0]), weights[0]


def _sums(term: Term) -> bool:
    return term.reduces or any(below.reduces for below in terms_below(term))


def _parts(term: Term, source: frozenset[Dim]) -> Iterator[Part]:
    """What a term is the sum of, as products of latents times scales."""
    term = below_results(term)
    if not _sums(term):
        yield Part((term,), None)
    elif term.reduces:
        yield Part((), _taken_apart(term, source)[1])
    elif term.op == "add" or term.op == "sub":
        yield from _parts(term.args[0], source)
        for part in _parts(term.args[1], source):
            yield _negated(part) if term.op == "sub" else part
    elif term.op == "neg":
        yield from map(_negated, _parts(term.args[0], source))
    elif term.op == "mul" and not all(map(_sums, term.args)):
        product, scale = sorted(term.args, key=_sums, reverse=True)
        for part in _parts(product, source):
            yield Part((*part.scales, below_results(scale)), part.weight)
    elif term.op == "where" and not term.args[0].axes & source and not _sums(term.args[0]):
        yield from _chosen(term, source)
    else:
        raise FusionError(_REASON)


def _negated(part: Part) -> Part:
    if part.weight is None:
        return Part((*part.scales, Term("number", value=-1.0)), None)
    return Part(part.scales, Term("neg", (part.weight,), part.weight.axes))


def _chosen(term: Term, source: frozenset[Dim]) -> Iterator[Part]:
    """Of two sums of products the one that a condition, the same at all places, wants."""
    condition = term.args[0]
    sides = [list(_parts(arg, source)) for arg in term.args[1:]]
    (first, *more), (second, *others) = sides
    if not more and not others and first.weight is not None and second.weight is not None:
        if list(map(id, first.scales)) == list(map(id, second.scales)):
            yield Part(first.scales, _where(condition, first.weight, second.weight))
            return
    for number, side in enumerate(sides):
        for part in side:
            if part.weight is None:
                one = Term("number", value=1.0)
                yield Part((*part.scales, _either(condition, one, number)), None)
            else:
                yield Part(part.scales, _either(condition, part.weight, number))


def _either(condition: Term, term: Term, number: int) -> Term:
    """The term on one side of a condition, and zero on the other."""
    zero = Term("number", value=0.0)
    return _where(condition, term, zero) if number == 0 else _where(condition, zero, term)


def _where(condition: Term, first: Term, second: Term) -> Term:
    return Term("where", (condition, first, second), condition.axes | first.axes | second.axes)


def _together(parts: Iterator[Part]) -> list[Part]:
    """Products with the same scales as one, of the sum of their weights."""
    found: dict[tuple[int, ...], Part] = {}
    for place, part in enumerate(parts):
        key = (-place - 1,) if part.weight is None else tuple(sorted(map(id, part.scales)))
        known = found.get(key)
        if known is not None and known.weight is not None and part.weight is not None:
            weight = Term("add", (known.weight, part.weight), known.weight.axes | part.weight.axes)
            part = Part(known.scales, weight)
        found[key] = part
    return list(found.values())
