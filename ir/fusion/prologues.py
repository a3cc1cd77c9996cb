"""Whether what stands before a contraction should be computed in each of its tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.attention import Attention
from regauge.ir.fusion.products import CODES, few_bit_sides
from regauge.ir.fusion.region import Region, Term, below_results, terms_below
from regauge.ir.sizes.expressions import Size, product

TILE = 128
"""Columns of a contraction that one program computes: what stands before it is computed for each of them again."""

MOST_ROWS = 512
"""Rows with which a weight of few bits is multiplied as it is stored: what it saves is reading it. With more of them a
product is bound by arithmetic, and a library is faster with the weight as floats, made once."""


def again(region: Region, bound: Callable[[Size], int]) -> str:
    """Why what stands before a contraction should not be computed in each of its tiles."""
    if region.attention is not None:
        return _again_in_attention(region.attention, bound)
    for contraction, few_bits in zip(region.contractions, few_bit_sides(region), strict=True):
        factors = below_results(contraction.args[0]).args
        computed = [below_results(factor).op != "load" for factor in factors]
        if any(term.op == "code" for factor in factors for term in terms_below(factor)):
            return "what is quantized is stored in few bits, which the product then reads"
        both = all(few or not own and _of_codes(f) for f, own, few in zip(factors, computed, few_bits, strict=True))
        for factor, own, few in zip(factors, computed, few_bits, strict=True):
            tiles = int(product(bound(dim.size) for dim in contraction.axes - factor.axes)) if own else 0
            if few and not both and tiles > MOST_ROWS:
                return f"with more than {MOST_ROWS} rows a library is faster, with the weight as floats"
            if not few and tiles > TILE:
                return f"what stands before a contraction would be computed again for every {TILE} columns"
    return ""


def _again_in_attention(parts: Attention, bound: Callable[[Size], int]) -> str:
    """Queries are computed once, keys and values for each tile of rows; of those that are stored in few bits it is only
    codes that become floats again. Keys, and values, are products of latents that have fewer numbers for a place
    than they; latents are mixed for each row, where values would be computed once."""

    def count(dims: Iterable[Dim]) -> int:
        return int(product(bound(dim.size) for dim in dims))

    rows, made_of = count(parts.rows), ((parts.keys, parts.latent_keys), (parts.values, parts.latent_values))
    for name, (factor, latents) in zip(("keys", "values"), made_of, strict=True):
        if latents is not None and count(latents.over) >= count(factor.axes - parts.source - latents.latents.axes):
            return f"what {name} are made of has more numbers than they"
    codes = [(parts.keys, parts.coded_keys), (parts.values, parts.coded_values)]
    if parts.latent_values is not None:
        rank, width = count(parts.value_rank), count(parts.columns)
        if rows > TILE or rows * rank > (rows + rank) * width:
            return "it would take more multiplications to mix what values are made of than to compute these once"
        del codes[1]
    made = [code for factor, code in codes if below_results(factor).op != "load"]
    if made and all(made):
        return f"with more than {MOST_ROWS} rows numbers of keys and values are faster" if rows > MOST_ROWS else ""
    return f"keys or values would be computed again for every {TILE} rows" if made and rows > TILE else ""


def _of_codes(factor: Term, most: int = 4) -> bool:
    """Whether a factor that is read was made of codes at most so many nodes before: it may still become a part."""
    values = [below_results(factor).value.value]
    for _ in range(most):
        nodes = [value.producer for value in values if value.producer is not None]
        values = [v for n in nodes if n.operator.coding or n.op in ("cast", "mul") for _, v in n.operands()]
        if any(value.dtype in CODES for value in values):
            return True
    return False
