"""How large the tiles of contractions are, and how many programs share one.

Tiles that more than one of these holds for are found by compiling for sm_80 and sm_90 with all versions of Triton that
are supported: what spills registers with one of them is left out (benchmarks/kernel_resources.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from regauge.backends.triton_kernels.launch import Launch, is_at_least, power_above
from regauge.backends.triton_kernels.loops import Loops, count, widths
from regauge.backends.triton_kernels.tiles import FLOAT8, Tiling
from regauge.ir.dims.extents import Dim

PROGRAMS = 256
"""Programs that keep a device busy: where tiles are fewer, several share one."""

LEAST_STEPS = 4
"""Steps of a part: with fewer, adding up would take longer than what it saves."""


def multiplies_float8(architecture: str) -> bool:
    """Whether tensor cores of an architecture multiply floats of 8 bits: all from sm_90 on are tried."""
    return is_at_least(architecture, 90)


def launch_of_tiles(
    loops: Loops, tiling: Tiling, sizes: Mapping[Dim, int], *, split: bool, float8: bool = False
) -> Launch:
    """Tiles of 128 by 128 at most, of 64 by 64 in single precision, which has no tensor cores; none below 16.

    ``float8``: products of two floats of 8 bits are computed as such, 32 at a time at least.
    """
    high, wide, depth = _tile(loops, tiling, sizes)
    tiles = tiles_of(loops, sizes, high, wide)
    constants = {"BLOCK_M": high, "BLOCK_N": wide, "BLOCK_K": depth, "GROUP": 8}
    if tiling.float8:
        constants[FLOAT8] = int(float8 and depth >= 32)
    warps = 8 if high * wide * _held(tiling) > 64 * 128 or tiling.products > 1 and high > 16 else 4
    apart = tiling.digits and not _many(tiling) and high <= 16  # more threads share what is taken apart
    if apart or tiling.bitmap or tiling.parts > 1 and high <= 32:  # or what is computed ahead of all parts
        warps = 8
    stages = 2 if tiling.bytes == 4 or _many(tiling) else 3
    if _many(tiling) and tiling.products > 1 and high > 16:  # no room for what is read ahead of two weights
        stages = 1
    if not split:
        return Launch(tiles, constants, warps, stages)
    parts = max(2, parts_of(loops, tiling, sizes))
    constants["SPLIT"] = parts
    return Launch(tiles, constants, warps, stages, parts, parts * tiling.products * tiles * high * wide)


def parts_of(loops: Loops, tiling: Tiling, sizes: Mapping[Dim, int]) -> int:
    """How many programs share a tile: 1 where tiles alone keep a device busy."""
    high, wide, depth = _tile(loops, tiling, sizes)
    tiles = tiles_of(loops, sizes, high, wide)
    steps = -(-_run(loops, tiling, sizes) // depth) * count(tiling.groups, sizes)
    return max(1, min(PROGRAMS // max(1, tiles), steps // LEAST_STEPS))


def tiles_of(loops: Loops, sizes: Mapping[Dim, int], high: int, wide: int) -> int:
    """How many tiles of so many rows and columns there are, those of each part for themselves."""
    columns = sum(-(-width // wide) for width in widths(loops, sizes))
    return -(-count(loops.rows, sizes) // high) * columns * count(loops.batch, sizes)


def _run(loops: Loops, tiling: Tiling, sizes: Mapping[Dim, int]) -> int:
    """Indices of what is contracted in one group, of one digit."""
    apart = {*tiling.groups, *tiling.digits}
    return count([loop for loop in loops.contracted if loop not in apart], sizes)


def _held(tiling: Tiling) -> int:
    """How many tiles of sums a program holds, of digits that are taken apart, and what else takes as many registers."""
    found = tiling.bitmap and (tiling.products > 1 or tiling.bytes == 1)  # where the entries of a deep tile lie
    return tiling.products * (2 if tiling.groups else 1) + bool(tiling.digits) + (tiling.parts > 1) + found


def _many(tiling: Tiling) -> bool:
    """Whether more than 4 numbers share a byte."""
    return math.prod(int(loop.dims[0].size) for loop in tiling.digits) > 4


def _tile(loops: Loops, tiling: Tiling, sizes: Mapping[Dim, int]) -> tuple[int, int, int]:
    """Rows, columns, and indices of what is contracted in a step."""
    most = 64 if tiling.bytes == 4 else 128
    deep = 32 if tiling.bytes == 4 else 128 if tiling.bytes == 1 else 64
    least = 32 if tiling.bytes == 1 else 16  # what tensor cores multiply at once
    rows, columns = count(loops.rows, sizes), max(widths(loops, sizes))
    high, wide = (min(most, max(16, power_above(size))) for size in (rows, columns))
    if high <= 32:  # a weight is read once: more programs read it
        wide = min(wide, 64)
    held = _held(tiling)
    if _many(tiling):  # each digit meets another tile of the left factor, and all of these are in registers at once
        return (high, 32, 32) if high <= 16 else (32, 64, least)
    shallow = bool(tiling.digits) and high > 16  # tiles of the left factor are read for each digit, and so are places
    deep = min(deep, 32) if shallow or tiling.bitmap else deep  # a mask has the bits of 32 entries
    if held > 1:
        high, wide = min(high, 64 if held < 4 else 32), min(wide, 128 if held == 2 or held == 3 and shallow else 64)
        deep = min(deep, 32) if held > 3 else deep
    return high, wide, min(deep, max(least, power_above(_run(loops, tiling, sizes))))
