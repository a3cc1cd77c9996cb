"""Whether a region can be one kernel: questions of loops, types and definitions, never of whether it would gain."""

from __future__ import annotations

import torch

from regauge.ir.fusion.region import Region, Term, below_results
from regauge.ir.sizes import is_static, symbols_in

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Types that kernels compute with: in single precision inside."""

MOST_NODES = 64
"""Nodes of one region: what is longer takes registers, and time to compile, without saving more bytes."""


def fault(region: Region) -> str | None:
    """Why the region is no kernel; None where it is one."""
    if len(region.nodes) > MOST_NODES:
        return f"a region has {MOST_NODES} nodes at most"
    return (
        _wrong_type(region)
        or _unread_loop(region)
        or (_wrong_tile(region) if region.contractions else _wrong_rows(region))
    )


def _wrong_type(region: Region) -> str | None:
    numbers = [number for load in region.loads for number in load.args[: len(load.value.picked)]]
    others = [load for load in region.loads if load not in numbers or _is_read_otherwise(region, load)]
    for value in (*region.results, *(load.value.value for load in others)):
        if value.dtype not in (*FLOATS, torch.bool):
            return f"kernels compute in half and single precision, {value.name} is {value.signature.partition('[')[0]}"
    for value in region.outputs:
        if value.dtype not in FLOATS:
            return f"the result {value.name} is no float"
    return None


def _is_read_otherwise(region: Region, number: Term) -> bool:
    """Whether the number of an entry is more than that: then it is computed with."""
    return any(number in term.args and (term.op != "load" or not term.value.picked) for term in region.terms)


def _unread_loop(region: Region) -> str | None:
    """A loop that nothing read has: of an axis that a node expands."""
    if not region.reduced <= {dim for load in region.loads for dim in load.axes}:
        return "it would reduce an axis that is only broadcast"
    known = {dim for load in region.loads for dim in load.value.places}
    known.update(dim for dim, length in region.lengths.items() if known.issuperset(dict(length.sizes)))
    symbols = {size for load in region.loads for size in load.value.value.shape if not is_static(size)}
    for dim in [*region.loops, *region.measured]:
        if dim not in known and not symbols_in(dim.size) <= symbols:
            return "the size of an axis of its results is that of nothing it reads"
    return None


def _wrong_rows(region: Region) -> str | None:
    """A pointwise kernel, or one that reduces rows: each output index belongs to one program."""
    if len({term.over for term in region.reductions}) > 1:
        return "it would reduce over different axes"
    rows = frozenset(region.loops) - region.reduced
    for value in region.outputs:
        if not rows <= region.dims(value):
            return f"its loops are not all axes of the result {value.name}"
    return None


def _wrong_tile(region: Region) -> str | None:
    """A contraction: pointwise before it over what it reads, and behind it over what it gives."""
    if len(region.contractions) > 1:
        return "it would have two contractions"
    (contraction,) = region.contractions
    if len(region.reductions) > 1:
        return "it would reduce rows beside a contraction, of which a program has only a tile"
    before = terms_below(contraction)
    if any(term.axes & contraction.over for term in region.terms if term not in before):
        return "an axis that is contracted goes on behind it"
    for value in region.outputs:
        if region.dims(value) != contraction.axes:
            return f"the axes of the result {value.name} are not those that the contraction gives"
    return None


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


def computed_in_windows(region: Region) -> bool:
    """Whether what windows go over is computed, and not only read: then it is once for each index of a window."""
    below = {term for one in region.reductions for term in terms_below(one)} if region.has_windows else set()
    return any(term.op == "result" and below_results(term).op != "load" for term in below if term.axes & region.reduced)


def computed_factors(region: Region) -> list[Term]:
    """The factors of a contraction that are computed, and not only read."""
    factors = [factor for term in region.contractions for factor in below_results(term.args[0]).args]
    return [factor for factor in factors if below_results(factor).op != "load"]
