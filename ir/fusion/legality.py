"""Whether a region can be one kernel: questions of loops, types and definitions, never of whether it would gain."""

from __future__ import annotations

import torch

from regauge.ir.errors import FusionError
from regauge.ir.extents import Dim
from regauge.ir.fusion.attention import find_attention
from regauge.ir.fusion.region import Region, below_results, terms_below
from regauge.ir.sizes import is_static

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Types that kernels compute with: in single precision inside."""

CODES = (torch.int8, torch.uint8)
"""Types of numbers that kernels read, and take for floats."""

MOST_NODES = 64
"""Nodes of one region: what is longer takes registers, and time to compile, without saving more bytes."""


def fault(region: Region) -> str | None:
    """Why the region is no kernel; None where it is one."""
    if len(region.nodes) > MOST_NODES:
        return f"a region has {MOST_NODES} nodes at most"
    reason = _wrong_type(region) or _unread_loop(region)
    if not reason and region.attention is None:
        reason = _wrong_tile(region) if region.contractions else _wrong_rows(region)
    heads = region.attention.head if region.attention is not None else frozenset()
    if not reason and region.reductions and not heads.issuperset(region.joints):
        return "it would join segments beside a reduction"
    return reason


def _wrong_type(region: Region) -> str | None:
    loaded = [load.value.value for load in region.loads]
    for value in (*region.results, *loaded):
        if value.dtype not in (*FLOATS, torch.bool, *(CODES if value in loaded else ())):
            return f"kernels compute in half and single precision, {value.name} is {value.signature.partition('[')[0]}"
    for value in region.outputs:
        if value.dtype not in FLOATS:
            return f"the result {value.name} is no float"
    return None


def _unread_loop(region: Region) -> str | None:
    """A loop that nothing read has: of an axis that a node expands."""
    read = {dim for load in region.loads for axis in load.value.layout for dim in axis}
    read.update(joint for joint, parts in region.joints.items() if read.issuperset(parts))
    if not region.reduced <= read:
        return "it would reduce an axis that is only broadcast"
    if any(not is_static(dim.size) and dim not in read for dim in region.loops):
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
    if len(region.contractions) == 2 < len(region.reductions):
        return _wrong_attention(region)
    if len(region.contractions) > 1:
        return f"it would have {'two' if len(region.contractions) == 2 else 'several'} contractions"
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


def _wrong_attention(region: Region) -> str:
    """Why two contractions with reductions between them are not attention."""
    try:
        find_attention(region)
    except FusionError as error:
        return str(error)
    raise AssertionError("attention is legal")


def computed_again(region: Region) -> list[frozenset[Dim]]:
    """The loops for whose tiles a factor of a contraction is computed again, of those that are computed and not read.

    Of attention queries are computed once, and what the softmax gives is no factor from outside.
    """
    parts = region.attention
    if parts is not None:
        pairs = [(parts.keys, parts.rows), (parts.values, parts.rows)]
    else:
        products = [(term, below_results(term.args[0])) for term in region.contractions]
        pairs = [(factor, term.axes - factor.axes) for term, product in products for factor in product.args]
    return [again for factor, again in pairs if below_results(factor).op != "load"]
