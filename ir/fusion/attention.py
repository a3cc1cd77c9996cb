"""Attention, read off the terms of a region: two sums of products with a softmax between them.

    scores[m, s]   sum over k of queries[m, k] * keys[s, k], where keys may be products themselves (:mod:`latent`)
    logits[m, s]   scores, scaled, masked, biased: whatever stands between, index by index
    weights[m, s]  exp(logits - peak), where peak is the greatest of the logits over s; total is their sum over s
    mixed[m, n]    sum over s of weights / total * values[s, n], where values may be products with latents, too

What has no loop ``s`` commutes with the last sum, the total above all, and the shift by the peak may be any number as
long as both sums take the same one. So one loop over s keeps the peak, the total and the mixture of what it has met,
and brings them to a new peak as it finds one (Milakov and Gimelshein 2018, Online normalizer calculation for softmax;
Dao et al. 2022, FlashAttention, algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from regauge.ir.dims.extents import Dim
from regauge.ir.errors import FusionError
from regauge.ir.fusion.coded import Coded, coded
from regauge.ir.fusion.latent import Latents, Mixed, latents_of, mixed_latents
from regauge.ir.fusion.online import is_shifted
from regauge.ir.fusion.region import Region, Term, below_results, terms_below
from regauge.ir.fusion.terms import PLACES
from regauge.ir.sizes.expressions import is_static, product

WIDEST = 256
"""Numbers of a head that a program holds at a time, of queries and keys and of values; wider ones are read in parts."""

MOST_NUMBERS = 4096
"""Numbers of a head at most: each part of values has programs of its own, which compute the scores again."""


@dataclass(frozen=True)
class Attention:
    """The parts of attention; ``peak``, ``total`` and ``mixed`` are reductions over ``source``.

    ``factors`` are what the mixture is multiplied by, or divided where the second entry is true. ``batch`` are loops of
    logits that keys or values have, ``rows`` the other ones that are not ``source``, ``head`` what scores are summed
    over, ``columns`` what values have alone.
    """

    queries: Term
    keys: Term
    values: Term
    scores: Term
    logits: Term
    peak: Term
    weights: Term
    total: Term
    mixed: Term
    factors: tuple[tuple[Term, bool], ...]

    @property
    def source(self) -> frozenset[Dim]:
        return self.mixed.over

    @property
    def head(self) -> frozenset[Dim]:
        return self.scores.over

    @property
    def batch(self) -> frozenset[Dim]:
        return ((self.keys.axes | self.values.axes) & self.logits.axes) - self.source

    @property
    def rows(self) -> frozenset[Dim]:
        return self.logits.axes - self.source - self.batch

    @property
    def columns(self) -> frozenset[Dim]:
        return self.values.axes - self.source - self.logits.axes

    @cached_property
    def coded_keys(self) -> Coded | None:
        """How keys are made of codes; None where they are read, or computed, as they are."""
        return coded(self.keys, self.source, self.head)

    @cached_property
    def coded_values(self) -> Coded | None:
        """How values are made of codes; None where they are read, or computed, as they are."""
        return coded(self.values, self.source, self.columns)

    @cached_property
    def latent_keys(self) -> Latents | None:
        """How keys are made of latents; None where no product makes them."""
        return latents_of(self.keys, self.source)

    @cached_property
    def latent_values(self) -> Mixed | None:
        """The latents that are mixed in place of values; None where no product makes these."""
        return mixed_latents(self.values, self.source, self.columns)

    @property
    def value_rank(self) -> frozenset[Dim]:
        """What values are summed over where they are made of latents."""
        return frozenset() if self.latent_values is None else self.latent_values.over

    @property
    def of_latents(self) -> bool:
        return self.latent_keys is not None or self.latent_values is not None

    @property
    def rank(self) -> frozenset[Dim]:
        """What keys are summed over where they are made of latents."""
        return frozenset() if self.latent_keys is None else self.latent_keys.over

    @property
    def wide_head(self) -> bool:
        """Whether scores are summed in several parts."""
        return _numbers(self.head) > WIDEST

    @property
    def wide_columns(self) -> bool:
        """Whether values are mixed in several parts."""
        return _numbers(self.columns) > WIDEST

    def letter(self, dim: Dim) -> str:
        """What loops of its kind are called (:attr:`Region.names`)."""
        kinds = {"s": self.source, "k": self.head, "b": self.batch, "n": self.columns, "r": self.rank}
        kinds["v"] = self.value_rank
        return next((letter for letter, dims in kinds.items() if dim in dims), "m")

    def behind(self, region: Region) -> list[Term]:
        """The terms that are computed once all of ``source`` is done, arguments first."""
        ends = {self.peak, self.total, self.mixed}
        found: set[Term] = set()
        stack = [*(region.results[value] for value in region.outputs), *(factor for factor, _ in self.factors)]
        while stack:
            term = stack.pop()
            if term not in found and term not in ends:
                found.add(term)
                stack.extend(term.args)
        return [term for term in region.terms if term in found]


def _numbers(dims: frozenset[Dim]) -> int:
    return int(product(dim.size for dim in dims))


def find_attention(region: Region) -> Attention:
    """The attention that a region computes; raises FusionError with the reason where it computes none."""
    peaks = [term for term in region.reductions if term.op == "amax"]
    sums = [term for term in region.reductions if term.op == "sum"]
    if len(peaks) != 1 or len(sums) < 3:
        raise FusionError("it would have two contractions, and no softmax between them")
    (peak,) = peaks
    logits = below_results(peak.args[0])
    inside = terms_below(peak)
    first, rest = [term for term in sums if term in inside], [term for term in sums if term not in inside]
    deeper = {one for term in first for one in terms_below(term)}
    (scores, *others) = [term for term in first if term not in deeper] or [peak]
    if len(rest) > 2:  # values may be sums themselves
        rest = [term for term in rest if term.over == peak.over]
    if others or len(rest) != 2 or below_results(scores.args[0]).op != "mul":
        raise FusionError("it would have two contractions, and no softmax between them")
    weights, total = _weights(rest, logits, peak)
    (mixed,) = (term for term in rest if term is not total)
    values, factors = _mixture(mixed, weights, peak)
    left, right = below_results(scores.args[0]).args
    keys, queries = (left, right) if left.axes & mixed.over else (right, left)
    if deeper.intersection(sums) - terms_below(keys) or deeper.intersection(sums) & terms_below(queries):
        raise FusionError("its queries are computed by products")
    inner = {*deeper, *terms_below(values), values}
    if not inner.issuperset({*sums} - {scores, total, mixed}):
        raise FusionError("it would reduce rows beside attention")
    found = Attention(queries, keys, values, scores, logits, peak, weights, total, mixed, factors)
    _check_loops(region, found)
    return found


def _weights(sums: list[Term], logits: Term, peak: Term) -> tuple[Term, Term]:
    """exp(logits - peak), and the one of the sums that is of this."""
    for total in sums:
        weights = below_results(total.args[0])
        if is_shifted(weights, logits, peak) and total.over == peak.over:
            return weights, total
    raise FusionError("what stands between its contractions is no softmax")


def _mixture(mixed: Term, weights: Term, peak: Term) -> tuple[Term, tuple[tuple[Term, bool], ...]]:
    """The values that are summed with the weights, and what commutes with the sum."""
    product = below_results(mixed.args[0])
    sides = [side for side in product.args if peak in terms_below(side)] if product.op == "mul" else []
    if mixed.over != peak.over or len(sides) != 1:
        raise FusionError("its second contraction is not of what the softmax gives and of values")
    (values,) = (side for side in product.args if side is not sides[0])
    factors = list(_factors(sides[0], inverse=False))
    inner = [pair for pair in factors if pair[0].axes & mixed.over]
    if [*map(tuple, inner)] != [(weights, False)]:
        raise FusionError("its second contraction is not of what the softmax gives and of values")
    return values, tuple(pair for pair in factors if pair[0] is not weights)


def _factors(term: Term, *, inverse: bool) -> Iterator[tuple[Term, bool]]:
    """The factors of a product of quotients, and which of them it is divided by."""
    below = below_results(term)
    if below.op not in ("mul", "div"):
        yield below, inverse
        return
    first, second = below.args
    yield from _factors(first, inverse=inverse)
    yield from _factors(second, inverse=inverse != (below.op == "div"))


def _check_loops(region: Region, found: Attention) -> None:
    source, head = found.source, found.head
    if not source <= found.keys.axes or source & found.queries.axes or not source <= found.values.axes:
        raise FusionError("its keys and values have not the same places")
    kinds = (head, found.rank, found.value_rank)
    inner = frozenset[Dim]().union(*kinds)
    if inner & (found.logits.axes | found.values.axes) or len(inner) < sum(map(len, kinds)):
        raise FusionError("an axis that is contracted goes on behind it")
    if any(term.axes & (source | inner) for term in found.behind(region)):
        raise FusionError("its weights are read behind the second contraction")
    given = found.batch | found.rows | found.columns
    for value in region.outputs:
        if region.dims(value) != given:
            raise FusionError(f"the axes of the result {value.name} are not those that the contraction gives")
    for side in (head, found.columns):
        sizes = [dim.size for dim in side]
        if not all(map(is_static, sizes)) or int(product(sizes)) > MOST_NUMBERS:
            raise FusionError(f"heads have {MOST_NUMBERS} numbers at most, and not a dynamic number")
    if not all(is_static(dim.size) for dim in found.value_rank) or _numbers(found.value_rank) > WIDEST:
        raise FusionError(f"latents of values have {WIDEST} numbers at most, and not a dynamic number")
    made = found.coded_keys or found.coded_values or found.latent_keys or found.latent_values
    if made is not None and (found.wide_head or found.wide_columns):
        raise FusionError(f"a program holds heads of {WIDEST} numbers at most where they are made of codes or latents")


def crowded(found: Attention) -> str:
    """Why a program cannot hold a tile of keys for each of the products that make them; nothing where it can. In single
    precision it has the factors in registers, too, and of ranks that 16 does not divide the addresses of numbers."""
    latent = found.latent_keys
    if latent is None:
        return ""
    head = _numbers(found.head)
    held = len(latent.products) * (1 << (head - 1).bit_length())  # tiles are powers of two
    factors = [latent.latents, *(part.weight for part in latent.products if part.weight is not None)]
    loads = [term for factor in factors for term in (factor, *terms_below(factor)) if term.op == "load"]
    reasons = {
        "in single precision": any(load.value.value.dtype == torch.float32 for load in loads),
        "where 16 does not divide their rank": any(dim.size % 16 != 0 for dim in latent.over),
    }
    most = 2 * WIDEST >> sum(reasons.values())
    if held <= most:
        return ""
    why = " and ".join(reason for reason, holds in reasons.items() if holds)
    return (
        f"its keys are {len(latent.products)} products of heads of {head} numbers: of those a program holds "
        f"{most // len(latent.products)}{f' {why}' if why else ''}"
    )


def causal_bound(found: Attention) -> Term | None:
    """The last place of ``source`` that a row reads, where logits are minus infinity behind it: an index of rows, from
    the first place of both, or from the end of both."""
    logits = below_results(found.logits)
    if logits.op != "where":
        return None
    condition, _, other = map(below_results, logits.args)
    if condition.op != "le" or other.op != "number" or other.value != -math.inf:
        return None
    place, last = map(below_results, condition.args)
    places = place.op == last.op and place.op in PLACES
    return last if places and frozenset(place.value) == found.source and last.axes <= found.rows else None
