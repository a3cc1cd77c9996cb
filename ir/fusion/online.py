"""Sums that need not wait for the greatest number of their row: those of exp(x - peak), where peak is amax of x.

One that was begun with a smaller peak is brought to a greater one by exp(old peak - new peak), so that both are found
in one pass (Milakov and Gimelshein 2018, Online normalizer calculation for softmax, algorithm 3).
"""

from __future__ import annotations

import math

from regauge.ir.fusion.region import Region, Term, below_results


def is_shifted(term: Term, x: Term, peak: Term) -> bool:
    """Whether a term is exp(x - peak); where the peak is minus infinity 0 may be subtracted in its place."""
    if term.op != "exp" or below_results(term.args[0]).op != "sub":
        return False
    minuend, shift = map(below_results, below_results(term.args[0]).args)
    if shift.op == "where":
        condition, instead, shift = map(below_results, shift.args)
        lowest = [below_results(arg) for arg in condition.args] if condition.op == "eq" else []
        if not lowest or lowest[0] is not peak or lowest[1].value != -math.inf or instead.op != "number":
            return False
    return minuend is x and shift is peak


def online_sums(region: Region, *, each_rounded: bool = False) -> dict[Term, Term]:
    """The sums of a region that are found with the peak that each is mapped to.

    With ``each_rounded`` only those whose differences and exponentials no node rounds: rounding knows but one peak.
    """
    peaks = [term for term in region.reductions if term.op == "amax"]
    found: dict[Term, Term] = {}
    for term in region.reductions:
        power = below_results(term.args[0])
        rounded = power is not term.args[0] or power.op == "exp" and power.args[0].op == "result"
        if term.op == "sum" and not (each_rounded and rounded):
            fitting = [p for p in peaks if p.over == term.over and is_shifted(power, below_results(p.args[0]), p)]
            found.update((term, peak) for peak in fitting)
    return found


def passes(region: Region, sums: dict[Term, Term]) -> dict[Term, int]:
    """How many passes over the columns of a row lie before a term can be computed, where ``sums`` need none for
    themselves."""
    found: dict[Term, int] = {}
    for term in region.terms:
        before = max((found[arg] for arg in term.args), default=0)
        found[term] = found[sums[term]] if term in sums else before + term.reduces
    return found
