"""Whether a region can be one kernel: questions of loops, types and definitions, never of whether it would gain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch

from regauge.ir.errors import FusionError
from regauge.ir.fusion.attention import crowded, find_attention
from regauge.ir.fusion.products import FLOAT8, products_of, same_left
from regauge.ir.fusion.region import Region, Term, below_results, terms_below
from regauge.ir.fusion.terms import DIGITS
from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import is_static, product, symbols_in

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Types that kernels compute with: in single precision inside."""

INTEGERS = (torch.int8, torch.uint8, torch.int16)
"""Types whose numbers single precision holds: kernels read them."""

NO_FLOAT = "is no float"
"""What is wrong with a result that is a truth value, or an integer, and is read outside of the region."""

MOST_PRODUCTS = 3
"""Contractions beside one another in a region: a program has a tile of each in registers."""

MOST_PARTS = 6
"""Products with columns of their own in a region: a program has tiles of one, but its text has all."""

WIDEST_TOTALS = 8192
"""Columns of rows that a program adds up while it has each of them as a whole: of more its registers are spilled."""

MOST_DIGITS = 8
"""Numbers that share a byte: a program goes through them in turn, each time with another part of the other factor."""

MOST_NODES = 64
"""Nodes of one region: what is longer takes registers, and time to compile, without saving more bytes."""


def fault(region: Region) -> str | None:
    """Why the region is no kernel; None where it is one."""
    if len(region.nodes) > MOST_NODES:
        return f"a region has {MOST_NODES} nodes at most"
    reason = _wrong_type(region) or _unread_loop(region)
    if reason:
        return reason
    if region.attention is not None:
        return crowded(region.attention) or None
    return _wrong_tile(region) if region.contractions else _wrong_rows(region)


def _wrong_type(region: Region) -> str | None:
    for value, term in region.results.items():
        codes = below_results(term).op in ("load", "code", *DIGITS) and value.dtype in (*INTEGERS, *FLOAT8)
        if value.dtype not in (*FLOATS, torch.bool) and not codes and below_results(term) not in region.whole:
            return _no_type(value)
    rounded = {arg for term in region.terms if term.op != "real" for arg in term.args}
    numbers = {number for load in region.loads for number in load.args[: len(load.value.picked)]}
    for load in region.loads:
        value = load.value.value
        if load in region.whole or load in numbers and not _is_read_otherwise(region, load):
            continue
        long = value.dtype == torch.int32 and load not in rounded  # torch rounds it to the type of its scale, too
        if not (long or value.dtype in (*FLOATS, *INTEGERS, *FLOAT8, torch.bool)):
            return _no_type(value)
    digits = [term.value for term in region.terms if term.op in DIGITS]
    if any(digit.base & (digit.base - 1) for digit in digits):
        return "numbers that share a byte have parts of a bit"
    counts = {digit.loop: digit.count for digit in digits}.values()
    each = max if region.attention is not None else prod  # keys and values have tiles of their own
    if region.contractions and counts and each(counts) > MOST_DIGITS:
        return f"more than {MOST_DIGITS} numbers share a byte"
    for value in region.outputs:
        if value.dtype not in FLOATS and below_results(region.results[value]).op not in ("digit", "code"):
            return f"the result {value.name} {NO_FLOAT}"
    return None


def _no_type(value: Value) -> str:
    """What a kernel has no such type for, and what to do where it is a float."""
    convert = ": convert the model, .float() or .half()" if value.dtype == torch.float64 else ""
    return f"kernels compute in half and single precision, {value.name} is {value.signature.partition('[')[0]}{convert}"


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
        if below_results(region.results[value]) not in region.totals and not rows <= region.dims(value):
            return f"its loops are not all axes of the result {value.name}"
    sizes = [dim.size for dim in region.reduced]
    if region.totals and not (all(map(is_static, sizes)) and int(product(sizes)) <= WIDEST_TOTALS):
        return f"it would add up rows of more than {WIDEST_TOTALS} columns, or of a dynamic number"
    return None


def _wrong_tile(region: Region) -> str | None:
    """A contraction: pointwise before it over what it reads, and behind it over what it gives."""
    contraction, *others = region.contractions
    rows = below_results(contraction.args[0]).args[0].axes - contraction.over
    if not set(_own_terms(region)).issuperset(region.contractions):
        return "it would compute a product again at other places of its axes"
    if len(others) == 1 and len(region.reductions) > 2 and not same_left(region):
        return _wrong_attention(region)
    loops = {(one.over, one.axes & rows) for one in region.contractions}
    if len(loops) > 1 or not same_left(region) or not _alike(region):
        return "it would have two contractions"
    if len(region.reductions) > 1 + len(others):
        return "it would reduce rows beside a contraction, of which a program has only a tile"
    if len(region.parts) > MOST_PARTS:
        return f"it would have more than {MOST_PARTS} products beside one another"
    if max(map(len, region.parts)) > MOST_PRODUCTS:
        return f"it would have more than {MOST_PRODUCTS} products, whose tiles no program holds"
    if any(not terms_below(term).isdisjoint(region.contractions) for term in region.contractions):
        return "it would have two contractions"
    if any(term.axes & contraction.over for term in terms_behind(region)):
        return "an axis that is contracted goes on behind it"
    for value in region.outputs:
        read = [one for one in region.contractions if one in terms_behind(region, [value])]
        if not any(region.dims(value) == part[0].axes and set(read) <= {*part} for part in region.parts):
            return f"the axes of the result {value.name} are not those that the contraction gives"
    return None


def _alike(region: Region) -> bool:
    """Whether parts go over what is contracted in the same steps: their scales and their bytes lie along the same
    loops of it."""
    found = [products_of(region, part) for part in region.parts]
    return len({(one.groups, one.digits) for one in found}) == 1


def _own_terms(region: Region) -> Iterator[Term]:
    """What nodes compute themselves, of the results of others, where they were captured."""
    stack = [arg for term in region.results.values() for arg in term.args]
    while stack:
        term = stack.pop()
        yield term
        stack += () if term.op == "result" else term.args


def terms_behind(region: Region, outputs: Sequence[Value] | None = None) -> set[Term]:
    """The terms that results are computed from, by default all, up to the contractions, and these."""
    found: set[Term] = set()
    stack = [region.results[value] for value in (region.outputs if outputs is None else outputs)]
    while stack:
        one = stack.pop()
        if one not in found:
            found.add(one)
            stack.extend(() if one in region.contractions else one.args)
    return found


def computed_in_windows(region: Region) -> bool:
    """Whether what windows go over is computed, and not only read: then it is once for each index of a window."""
    below = {term for one in region.reductions for term in terms_below(one)} if region.has_windows else set()
    return any(term.op == "result" and below_results(term).op != "load" for term in below if term.axes & region.reduced)


def _wrong_attention(region: Region) -> str:
    """Why two contractions with reductions between them are not attention."""
    try:
        find_attention(region)
    except FusionError as error:
        return str(error)
    return "it would reduce rows beside attention"
