"""How large the tiles of attention are, and among how many programs its places are shared out.

Tiles are found by compiling for sm_80 and sm_90 with all versions of Triton that are supported: what spills registers
with one of them is left out (benchmarks/kernel_resources.py), but for 8 bytes where slopes of heads of 512 numbers are
trained in single precision, with Triton 3.9 on sm_80.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from regauge.backends.triton_kernels.attention import AttentionForm
from regauge.backends.triton_kernels.attention_gradient import GradientForm
from regauge.backends.triton_kernels.bias_gradient import ENTRIES, Shares
from regauge.backends.triton_kernels.launch import Launch, is_at_least, power_above
from regauge.backends.triton_kernels.loops import Loops, Tensor, count
from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.attention import WIDEST
from regauge.ir.fusion.products import CODES
from regauge.ir.fusion.wide_gradients import block_of

WIDE_COLUMNS = 128
"""Columns of values that a program has where they are too many for one."""

MOST_ROWS = 128
"""Queries of a program."""

BUSY, LEAST_PLACES, MOST_SPLITS = 256, 256, 64
"""Programs that keep a GPU busy (two for each processor), places that are worth a program, and parts of them."""


def splits_of(loops: Loops, sizes: Mapping[Dim, int]) -> int:
    """Among how many programs the places of a tile of queries are shared out, so that there are BUSY programs."""
    tiles = count(loops.batch, sizes) * -(-count(loops.rows, sizes) // MOST_ROWS)
    most = min(BUSY // max(tiles, 1), count(loops.source, sizes) // LEAST_PLACES, MOST_SPLITS)
    return 1 << most.bit_length() - 1 if most > 1 else 1


def scratch_sizes(form: str, loops: Loops, sizes: Mapping[Dim, int], splits: int) -> list[int]:
    """How many numbers each of SCRATCH holds, or of STATISTICS."""
    rows = splits * count(loops.batch, sizes) * count(loops.rows, sizes)
    if form == "statistics":
        return [rows, rows]
    return [rows, rows, rows * count(loops.columns, sizes)]


def launch_of_attention(
    form: AttentionForm, reads: Sequence[Tensor], loops: Loops, sizes: Mapping[Dim, int], architecture: str = ""
) -> Launch:
    """Of wide heads, and where masks are read, a program has fewer queries and places at a time, so that none of its
    registers are spilled; a factor of a product is never below 16. Tensor cores that read factors from shared memory
    leave registers for more places."""
    rows, columns, head = (count(one, sizes) for one in (loops.rows, loops.columns, loops.contracted))
    latents = count(loops.value_rank, sizes) if loops.value_rank else 0
    width = max(columns, head, latents)
    of_places = [tensor for tensor in reads if tensor.loops(loops.source)]
    masks = [tensor for tensor in of_places if tensor.loops(loops.rows)]
    more = len(of_places) - len(masks) > 2  # is read of each place than keys and values
    of_heads = [tensor for tensor in of_places if tensor.loops((*loops.contracted, *loops.columns, *loops.value_rank))]
    coded = any(tensor.value.dtype in CODES for tensor in of_heads)
    factors = [tensor for tensor in reads if tensor in of_heads or tensor.loops(loops.rows)]
    single, warps = any(tensor.value.dtype == torch.float32 for tensor in factors), 8
    crowded = bool(loops.rank) and (single or head > 128)  # a tile of keys for each product is most of the registers
    if single or crowded:
        most, deep = (32 if width <= 128 and not crowded else 16), 32  # there are no tensor cores for single precision
    elif coded:  # of groups of channels each number has a range, and an address of it, of its own
        most, deep = 64, 16 if len(of_heads) > 2 else 64 if rows <= 16 and len(of_heads) == 2 else 32
    elif width <= 64 or width <= 128 and not masks:
        most, deep = MOST_ROWS, 64 if width <= 64 or is_at_least(architecture, 90) else 32
    else:
        most, deep, warps = (64, 32, 4) if width <= 128 else (64, 32, 8)
    if latents:  # there is a mixture of them for each row
        most = 16 if latents > WIDE_COLUMNS or loops.rank else min(most, 64)
    high = min(16 if form == "combine" else most, max(16, power_above(rows)))
    more = (len(of_heads) > 2 or width > 64) if coded else more  # more threads share what is taken apart
    more = more or bool(crowded or latents and loops.rank and not coded)
    warps = 4 if high == 16 and width <= 128 and not more else warps
    wide = min(WIDE_COLUMNS if columns > WIDEST else WIDEST, max(16, power_above(columns)))
    constants = {"BLOCK_M": high, "BLOCK_N": wide}
    programs = -(-rows // high) * count(loops.batch, sizes) * -(-columns // wide)
    splits = max(2, splits_of(loops, sizes))
    if form == "combine":
        return Launch(programs, {**constants, "SPLITS": splits}, warps)
    constants |= {"BLOCK_K": 64 if head > WIDEST else max(16, power_above(head)), "BLOCK_S": deep}
    if loops.rank:  # there is a tile of keys for each product, too
        constants["BLOCK_S"] = deep if width <= 64 and not latents else 32
        rank, most = count(loops.rank, sizes), 64 if width <= 64 else 32
        if rank % 16 or latents % 16:  # what does not begin at a multiple of 16 is read one by one
            most = 16 if latents else 32
        constants["BLOCK_R"] = min(most, max(16, power_above(rank)))
        if crowded:  # nothing is read ahead
            constants |= {"BLOCK_S": 32 if head <= 64 else 16, "BLOCK_R": 16}
    if latents:
        constants["BLOCK_V"] = max(16, power_above(latents))
    if form == "split":
        constants["SPLITS"], programs = splits, programs * splits
    return Launch(programs, constants, warps, stages=1 if crowded else 2)


def launch_of_gradient(form: GradientForm, reads: Sequence[Tensor], loops: Loops, sizes: Mapping[Dim, int]) -> Launch:
    """Programs have a tile of queries, or of places, and go through the other ones; tiles are small enough for two
    gradients and four factors in registers."""
    rows, columns, head, source = (
        count(one, sizes) for one in (loops.rows, loops.columns, loops.contracted, loops.source)
    )
    width = max(columns, head)
    single = any(tensor.value.dtype == torch.float32 for tensor in reads)
    masks = [tensor for tensor in reads if tensor.loops(loops.rows) and tensor.loops(loops.source)]
    if width > WIDEST:
        return _launch_in_parts(form, loops, sizes, single=single, masked=bool(masks))
    own, other = (32, 16) if single else (64, 32)
    if width <= 64 and not single:
        own = 128 if form != "of_keys" else own
    crowded = form == "of_keys" and bool(masks)  # no room for what is read ahead
    biased = any(tensor.value.dtype != torch.bool for tensor in masks)  # four warps would spill biases
    own = (64 if biased and width <= 128 and not single else 32) if crowded else own
    high, deep = (other, own) if form == "of_keys" else (own, other)
    last = loops.rows[-1:] if form == "of_keys" else loops.rows
    high, deep = min(high, max(16, power_above(count(last, sizes)))), min(deep, max(16, power_above(source)))
    tiles = -(-source // deep) if form == "of_keys" else -(-rows // high)
    constants = {"BLOCK_M": high, "BLOCK_N": max(16, power_above(columns)), "BLOCK_K": max(16, power_above(head))}
    warps = 4 if single or crowded and not biased else 8
    programs = tiles * count(loops.batch, sizes)
    return Launch(programs, {**constants, "BLOCK_S": deep}, warps, stages=1 if crowded else 2)


def _launch_in_parts(
    form: GradientForm, loops: Loops, sizes: Mapping[Dim, int], *, single: bool, masked: bool
) -> Launch:
    """Of wide heads a program keeps one gradient in registers, of 32 queries or places (of 16 without tensor cores):
    what leads to it is read again, a few numbers of a head at a time."""
    rows, columns, head, source = (
        count(one, sizes) for one in (loops.rows, loops.columns, loops.contracted, loops.source)
    )
    of_places = form in ("of_keys", "of_values")
    own, other, deep = (16, 16, 32) if single else (32, 32, 64)
    own *= 2 if form == "statistics" else 1
    high, wide = (other, own) if of_places else (own, other)
    last = count(loops.rows[-1:], sizes) if of_places else rows
    high, wide = min(high, max(16, power_above(last))), min(wide, max(16, power_above(source)))
    tiles = -(-source // wide) if of_places else -(-rows // high)
    blocks = {"BLOCK_N": block_of(columns), "BLOCK_K": block_of(head)}
    if form == "of_values":
        tiles *= -(-columns // blocks["BLOCK_N"])
    elif form != "statistics":
        tiles *= -(-head // blocks["BLOCK_K"])
    constants = {"BLOCK_M": high, **blocks, "BLOCK_S": wide, "BLOCK_D": deep}
    return Launch(tiles * count(loops.batch, sizes), constants, 8, stages=1 if single or of_places and masked else 2)


def launch_of_bias(
    reads: Sequence[Tensor], bias: Tensor, loops: Loops, sizes: Mapping[Dim, int], architecture: str = ""
) -> Launch:
    """Programs have a tile of the bias; where tiles are too few, PARTS programs share what leads to each. Tensor cores
    that read factors from shared memory take 64 rows at a time."""
    rows, columns, head, source = (
        count(one, sizes) for one in (loops.rows[-1:], loops.columns, loops.contracted, loops.source)
    )
    single = any(tensor.value.dtype == torch.float32 for tensor in reads)
    in_parts = max(columns, head) > WIDEST
    high, deep, warps = (64, 32, 8) if is_at_least(architecture, 90) and not single else (32, 32, 4)
    if in_parts:
        high, deep, warps = (16, 16, 4) if single else (high, deep, 4)
    high, deep = min(high, max(16, power_above(rows))), min(deep, max(16, power_above(source)))
    tiles, steps = Shares(bias, loops).counts(sizes, high, deep)
    most = min(BUSY // max(tiles, 1), steps)
    parts = 1 << most.bit_length() - 1 if most > 1 else 1
    constants = {"BLOCK_M": high, "BLOCK_N": max(16, power_above(columns)), "BLOCK_K": max(16, power_above(head))}
    constants |= {"BLOCK_S": deep, "PARTS": parts}
    if in_parts:
        constants["BLOCK_D"] = 32 if single else 64
    return Launch(tiles * parts, constants, warps, stages=1)


def launch_of_total(
    reads: Sequence[Tensor], bias: Tensor, loops: Loops, sizes: Mapping[Dim, int], architecture: str = ""
) -> Launch:
    """Programs add up the parts of some entries; there are none where a bias has but one part."""
    parts = launch_of_bias(reads, bias, loops, sizes, architecture).constants["PARTS"]
    programs = -(-count(bias.loops(loops.all), sizes) // ENTRIES) if parts > 1 else 0
    return Launch(programs, {"BLOCK": ENTRIES, "PARTS": parts}, 4)
