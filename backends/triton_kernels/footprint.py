"""What the kernel of a region takes of a GPU, told without compiling: planning asks it of each region that would gain.

Tiles and warps are those of the shipped table, or of the rules for tiles that no table holds; registers are a model. In
the kernels that are printed from regions, results are stored at the end, and a reduction lies between what is read
before and after it, so that a thread keeps its entries of each value that is needed later, in a register each:

    registers = 16 + entries of a thread * values that are kept at once

Of compiled kernels this is what is kept across a reduction to within a few registers, where nothing else is, and what
is read ahead, or addresses, take more where there is room (``benchmarks/kernel_resources.py``). Sums of tiles take what
their loop does, and their results three quarters of a register each, for they are stored in parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

from regauge.backends.triton_kernels.kernel import Kernel, Source, config_for, launch_of
from regauge.backends.triton_kernels.launch import MOST_REGISTERS, Launch
from regauge.backends.triton_kernels.screen import GPUS, LATENCY, Gpu, resident
from regauge.ir.cost import item_size
from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.footprint import Footprint
from regauge.ir.fusion.legality import terms_behind
from regauge.ir.fusion.region import Region, Term

ARCHITECTURE = "sm_80"
"""What plans are made for: the oldest that tables are shipped for, so that a plan is the same everywhere."""

OWN_REGISTERS, OF_TILE = 16, 0.75
"""Registers that a thread has beside entries of values, and those of an entry of a result of a product."""

LEAST_SPILLED = 32
"""Bytes of a thread from which a kernel counts as one that spills: fewer are let pass, as torch's inductor does."""

BUSY_WARPS = 8
"""Warps of a processor that keep its tensor cores busy."""


def footprint(
    region: Region, sizes: Mapping[Dim, int], architecture: str = ARCHITECTURE, gpu: Gpu | None = None
) -> Footprint:
    """What the kernel of a region takes, for sizes of its loops; of attention only how many launches it is.

    Raises FusionError where it can be none for such sizes.
    """
    kernel = Kernel(region, "kernel", "fused")
    source = kernel.outline(kernel.form_for(sizes))
    launches = _launches(source)
    if region.attention is not None:  # its tiles are found by compiling, for what it reads
        return Footprint(launches)
    gpu = GPUS[architecture] if gpu is None else gpu
    start = launch_of(source, sizes, config_for(source, sizes, architecture), architecture)
    wanted = registers_of(region, source, start)
    most = min(MOST_REGISTERS, gpu.registers // (32 * start.warps))
    spilled = 4 * max(0, wanted - most)
    registers, shared = min(wanted, most), _shared(source, start)
    together = resident(start, registers, shared, gpu)
    reached = _reached(source, start, together, gpu)
    return Footprint(launches, registers, spilled if spilled > LEAST_SPILLED else 0, shared, together, reached)


def _launches(source: Source) -> int:
    """Kernels that are started one after the other, and sums of what programs leave."""
    return len(source.kernels) + len(source.totals) + (_launches(source.then) if source.then is not None else 0)


def registers_of(region: Region, source: Source, start: Launch) -> int:
    """The registers that a thread wants."""
    numbers, threads = start.constants, 32 * start.warps
    if source.tiling is not None:
        entries = numbers["BLOCK_M"] * numbers["BLOCK_N"] // threads
        loop = min(MOST_REGISTERS, 64 + entries * source.tiling.products)
        return max(loop, OWN_REGISTERS + int(OF_TILE * entries * kept_values(region, source)))
    entries = max(1, numbers.get("ROWS", 1) * numbers["BLOCK"] // threads)
    sums = max(1, numbers["BLOCK"] // threads) * len(source.totals)
    return OWN_REGISTERS + entries * kept_values(region, source) + sums


def kept_values(region: Region, source: Source) -> int:
    """How many values with an entry for each one of a tile are kept at once, at most."""
    columns = {dim for part in source.loops.parts or [source.loops.columns] for loop in part for dim in loop.dims}
    rows = {dim for loop in source.loops.rows for dim in loop.dims} if source.tiling else set()
    terms = _at_once(region, source)
    uses: dict[Term, int] = {}
    for term in terms:
        for arg in term.args:
            uses[arg] = uses.get(arg, 0) + 1
    lines = {t for t in terms if t.op in ("load", "result") or t.reduces or uses.get(t, 0) > 1 and t.args}
    wide = {t for t in lines if t.axes & columns and (not rows or t.axes & rows)}
    totals = set(region.totals)
    last = [region.results[value] for value in region.outputs]
    last += [arg for term in totals for arg in term.args]
    return _most_kept([t for t in terms if t in lines and t not in totals], lines, wide, last)


def _at_once(region: Region, source: Source) -> Sequence[Term]:
    """The terms that lie between what is read, or summed before, and results; in order."""
    if source.tiling is not None:
        behind = terms_behind(region)
    elif source.form == "looped":  # each of its loops reads again, and keeps what is reduced of each row
        behind = _without_reductions(region)
    else:
        behind = {term for term in region.terms if source.form != "swept" or not term.axes & region.reduced}
    return [term for term in region.terms if term in behind]


def _without_reductions(region: Region) -> set[Term]:
    """What results are computed from, but what is reduced."""
    found: set[Term] = set()
    stack = [region.results[value] for value in region.outputs]
    while stack:
        term = stack.pop()
        if term not in found and not term.reduces:
            found.add(term)
            stack += term.args
    return found


def _most_kept(order: Sequence[Term], lines: Collection[Term], wide: Collection[Term], last: Sequence[Term]) -> int:
    """At how many places of an order at most something that was there before is read later; what is read is there
    from its first use, and ``last`` is read at the end."""
    place = {term: number for number, term in enumerate(order)}
    first: dict[Term, int] = {}
    ends: dict[Term, int] = {}
    for term in order:
        for below in _lines_read(term, lines):
            if below in wide:
                own = place[term] if below.op == "load" else place.get(below, 0)
                first[below] = min(first.get(below, own), own)
                ends[below] = max(ends.get(below, 0), place[term])
    for term in last:
        for below in [term] if term in lines else _lines_read(term, lines):
            if below in wide:
                first.setdefault(below, place.get(below, 0))
                ends[below] = len(order)
    change = [0] * (len(order) + 1)
    for term, end in ends.items():
        change[first[term]] += 1
        change[end] -= 1
    return max(accumulate(change), default=0)


def _lines_read(term: Term, lines: Collection[Term]) -> set[Term]:
    """What has a line of its own among the terms that a term is written with."""
    found: set[Term] = set()
    stack = list(term.args)
    while stack:
        arg = stack.pop()
        if arg in lines:
            found.add(arg)
        elif not arg.reduces:
            stack += arg.args
    return found


def _shared(source: Source, start: Launch) -> int:
    """Bytes that a program shares: the tiles of both factors in each stage."""
    if source.tiling is None:
        return 0
    numbers = start.constants
    sides = numbers["BLOCK_M"] + numbers["BLOCK_N"] * source.tiling.products
    return start.stages * sides * numbers["BLOCK_K"] * source.tiling.bytes


def _reached(source: Source, start: Launch, together: int, gpu: Gpu) -> float:
    """The share of arithmetic that warps of a processor reach, or of the bandwidth that bytes on their way do (Little's
    law); all of it where programs are too few for any difference."""
    if source.tiling is not None:
        return min(1.0, together * start.warps / BUSY_WARPS)
    if start.programs < together * gpu.processors:
        return 1.0
    tile = start.constants.get("ROWS", 1) * start.constants["BLOCK"]
    columns = source.loops.columns
    on_the_way = tile * sum(item_size(tensor.value.dtype) for tensor in source.tensors if tensor.loops(columns))
    return min(1.0, together * on_the_way * gpu.processors / (gpu.memory * LATENCY))
