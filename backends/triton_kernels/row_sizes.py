"""How large the tiles of kernels without products are: those of a table, with less for a thread where it has no room.

Entries that lie side by side in memory share an address, and are read 8 at a time. Where neighbours of a tile lie apart
(every other one, backwards, or down a column), each has an address of its own, of two registers; where a tile goes
through several axes as one, it is too dear to be computed again, and stays while a row is reduced. What registers are
counted as is a fit to what ptxas takes for the kernels of tests/kernel_forms.py, with all versions of Triton that are
supported: more than it allows has spilled with one of them (benchmarks/kernel_resources.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from regauge.backends.triton_kernels.configs import Case, Config
from regauge.backends.triton_kernels.launch import MOST_REGISTERS, REGISTERS, power_above
from regauge.backends.triton_kernels.loops import Loops, Tensor
from regauge.backends.triton_kernels.rows import RowForm

ALWAYS, ADDRESS = 24, 2
"""Registers that a thread has beside those of its entries, and those of an address."""

MOST_WARPS = 32

ROOM = 64
"""Registers that a thread may fill where tiles are as small as one likes: half of all threads fit a multiprocessor."""


def tile_of_rows(
    form: RowForm, loops: Loops, tensors: Iterable[Tensor], config: Config, case: Case
) -> tuple[dict[str, int], int]:
    """The tile of a program, and its warps.

    Where no row is reduced a tile with addresses of its own has fewer entries: several for a thread gain nothing, as
    none are read at once. A row that is reduced as a whole keeps its entries, and has the most threads whose registers
    are enough for these.
    """
    (rows, columns, _), entries, warps = case.sizes, config.tile["ENTRIES"], config.warps
    if form in ("pointwise", "swept"):
        apart = sum(_lies_apart(tensor, loops) for tensor in tensors)
        while apart and entries > 32 * warps and _registers(entries, warps, 1 + ADDRESS * apart) > ROOM:
            entries //= 2
    whole = form in ("rows", "summed")
    block = power_above(columns) if whole else min(power_above(columns), entries)
    together = max(1, min(entries // block, power_above(rows)))
    if whole:
        warps = _warps_for(together * block, warps, loops, case) or warps
    return {"ROWS": together, "BLOCK": block}, warps


def holds_rows(loops: Loops, case: Case) -> bool:
    """Whether the registers of a program are enough for a row that it reduces as a whole."""
    return _warps_for(power_above(case.sizes[1]), MOST_WARPS, loops, case) is not None


def _warps_for(entries: int, most: int, loops: Loops, case: Case) -> int | None:
    """The most warps whose threads have the registers for a tile of whole rows; None where no number of them does."""
    if len(loops.columns) < 2:
        return most
    of_entry = (2 if case.numbers == "single" else 1) + ADDRESS  # halves share a register until they are needed
    for warps in (most >> shift for shift in range(most.bit_length())):
        if _registers(entries, warps, of_entry) <= min(MOST_REGISTERS, REGISTERS // (32 * warps)):
            return warps
    return None


def _lies_apart(tensor: Tensor, loops: Loops) -> bool:
    """Whether entries of a tensor for neighbouring columns of a tile are not neighbours in memory."""
    if not tensor.loops(loops.columns):
        return False
    last = loops.columns[-1].dims[-1]
    flat = [dim for axis in tensor.layout for dim in axis]
    beside = flat[-1] in tensor.places and tensor.places[flat[-1]].steps == ((last, 1),)
    return len(loops.columns) > 1 or not beside


def _registers(entries: int, warps: int, of_entry: int) -> int:
    """About how many registers a thread takes."""
    return ALWAYS + -(-entries // (32 * warps)) * of_entry
