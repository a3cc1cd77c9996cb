"""Kernels of regions: ``triton_kernel(region)`` gives readable Triton source and how it is launched.

    kernel = triton_kernel(region, "add_norm")
    print(kernel.source)
    results = kernel.launch({value: tensor, ...})      a tensor for each result of the region

The text is the same for all sizes. Sources are made where they are first needed: one for tensors whose axes lie one
behind the other in memory, one for any strides, and of reductions each at once or in a loop, by the length of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from regauge.backends.torch_runtime import import_source
from regauge.backends.triton_attention import (
    MOST_ROWS,
    AttentionForm,
    AttentionKernel,
    scratch_sizes,
    splits_of,
)
from regauge.backends.triton_contraction import ContractionKernel
from regauge.backends.triton_loops import Loops, Tensor, count, fits, sizes_of, strides_of
from regauge.backends.triton_rows import RowForm, RowKernel
from regauge.backends.triton_source import Rounding
from regauge.ir.errors import FusionError
from regauge.ir.extents import Dim
from regauge.ir.fusion.legality import fault
from regauge.ir.fusion.plan import PERSISTENT
from regauge.ir.fusion.region import Kind, Layout, Region
from regauge.ir.graph import Value

Form: TypeAlias = RowForm | Literal["contraction"] | AttentionForm
BLOCK = 1024
"""Entries of a tile of a pointwise kernel. A loop over the columns of rows takes twice as many at a time."""


_FORMS: Mapping[Kind, tuple[Form, ...]] = {
    "pointwise": ("pointwise",),
    "row reduction": ("rows", "looped"),
    "contraction": ("contraction",),
    "attention": ("attention", "split"),
}


@dataclass(frozen=True, eq=False)
class Source:
    """One text of a kernel: what it reads and writes in the order of its arguments, and its loops.

    ``scratch`` are names of what is handed on to the kernel that runs ``then``.
    """

    text: str
    name: str
    form: Form
    rounding: Rounding
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    loops: Loops
    scratch: tuple[str, ...] = ()
    then: Source | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.reads, *self.writes)

    def function(self) -> Any:
        """The kernel as Triton has it; raises FusionError where Triton is not installed."""
        try:
            return getattr(import_source(self.text, self.name), self.name)
        except ModuleNotFoundError as error:
            raise FusionError("kernels need Triton: pip install 'regauge[triton]'") from error


@dataclass(frozen=True)
class Launch:
    """How a kernel is started: how many programs, with which constants, in how many warps.

    ``stages`` is how many steps of a loop are in flight at a time.
    """

    programs: int
    constants: Mapping[str, int]
    warps: int
    stages: int = 2

    def options(self, rounding: Rounding) -> dict[str, Any]:
        """What Triton is told; where each node is rounded no product may be fused with a sum."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": rounding == "fused"}


@dataclass(eq=False)
class Kernel:
    """The kernel of one region; make one with :func:`triton_kernel`."""

    region: Region
    name: str
    rounding: Rounding
    _sources: dict[tuple[Form, bool], Source] = field(default_factory=dict)

    def source(self, form: Form | None = None, *, contiguous: bool = True) -> Source:
        """The text of a form, by default of rows at once, for axes one behind the other or for any strides."""
        form = self.forms[0] if form is None else form
        if form not in self.forms:
            raise FusionError(f"kernel {self.name} is {' or '.join(self.forms)}, not {form}")
        if (form, contiguous) not in self._sources:
            self._sources[form, contiguous] = self._write(form, contiguous)
        return self._sources[form, contiguous]

    @property
    def forms(self) -> tuple[Form, ...]:
        return _FORMS[self.region.kind]

    def _write(self, form: Form, contiguous: bool) -> Source:
        region, name, rounding = self.region, self.name, self.rounding
        writer: RowKernel | ContractionKernel
        scratch: tuple[str, ...] = ()
        if form == "contraction":
            writer = ContractionKernel(region, name, rounding, contiguous=contiguous)
        elif form == "attention" or form == "split" or form == "combine":
            writer = AttentionKernel(region, name, form, contiguous=contiguous)
            name, scratch = writer.name_of_kernel, writer.scratch
        else:
            writer = RowKernel(region, name, form, rounding, contiguous=contiguous)
        then = self._write("combine", contiguous) if form == "split" else None
        reads, writes = tuple(writer.reads), tuple(writer.writes)
        return Source(writer.source(), name, form, rounding, reads, writes, writer.loops, scratch, then)

    def launch(self, given: Mapping[Value, torch.Tensor], form: Form | None = None) -> dict[Value, torch.Tensor]:
        """The results of the region for the tensors that it reads, on their device; ``form`` None: by the sizes."""
        source = self.source(form)
        sizes = sizes_of(source.reads, given, self.region.joints)
        if form is None and source.form == "rows" and count(source.loops.columns, sizes) > PERSISTENT:
            source = self.source("looped")
        if form is None and source.form == "attention" and splits_of(source.loops, sizes) > 1:
            source = self.source("split")
        steps = {tensor: strides_of(tensor, given[tensor.value], sizes) for tensor in source.reads}
        if not all(fits(loop, steps[t], sizes) for t in source.reads for loop in t.loops(source.loops.all)):
            source = self.source(source.form, contiguous=False)
            steps = {tensor: strides_of(tensor, given[tensor.value], sizes) for tensor in source.reads}
        device = next(iter(given.values())).device
        results = {tensor.value: _empty(tensor, sizes, device) for tensor in source.writes}
        steps.update((tensor, strides_of(tensor, results[tensor.value], sizes)) for tensor in source.writes)
        start = launch_of(source, sizes)
        if start.programs:
            tensors = [*(given[tensor.value] for tensor in source.reads), *results.values()]
            if source.scratch:
                handed = scratch_sizes(source.loops, sizes, start.constants["SPLITS"])
                tensors += [torch.empty(size, dtype=torch.float32, device=device) for size in handed]
            arguments = [*tensors, *numbers(source, sizes, steps)]
            _start(source, start, arguments)
            if source.then is not None:  # its arguments are the same
                _start(source.then, launch_of(source.then, sizes), arguments)
        return results


def _start(source: Source, start: Launch, arguments: Sequence[Any]) -> None:
    launcher = source.function()[(start.programs,)]
    launcher(*arguments, **start.constants, **start.options(source.rounding))


def triton_kernel(region: Region, name: str = "kernel", *, rounding: Rounding = "fused") -> Kernel:
    """The kernel of a region; raises FusionError where it can be none.

    ``rounding`` is part of what it computes: ``fused`` rounds results once, ``eager`` whatever a node gives.
    """
    reason = fault(region)
    if reason is not None:
        raise FusionError(f"{name}: {reason}")
    if region.attention is not None and rounding == "eager":
        raise FusionError(f"{name}: attention in one pass rounds what it gives, not each of its nodes")
    if not name.isidentifier():
        raise FusionError(f"a kernel cannot be called {name!r}: give a name that Python can have")
    return Kernel(region, name, rounding)


def _empty(tensor: Tensor, sizes: Mapping[Dim, int], device: torch.device) -> torch.Tensor:
    assert isinstance(tensor.value.dtype, torch.dtype)
    return torch.empty(shape_of(tensor.layout, sizes), dtype=tensor.value.dtype, device=device)


def shape_of(layout: Layout, sizes: Mapping[Dim, int]) -> list[int]:
    return [math.prod(sizes[dim] for dim in axis) for axis in layout]


def numbers(source: Source, sizes: Mapping[Dim, int], steps: Mapping[Tensor, Mapping[Dim, int]]) -> list[int]:
    """The arguments behind the pointers: sizes of loops, then steps of tensors along them."""
    loops = source.loops.all
    found = [loop.size(sizes) for loop in loops]
    return found + [steps[tensor][loop.dims[-1]] for tensor in source.tensors for loop in tensor.loops(loops)]


def launch_of(source: Source, sizes: Mapping[Dim, int]) -> Launch:
    """How a kernel is started for given sizes."""
    rows, columns = count(source.loops.rows, sizes), count(source.loops.columns, sizes)
    if source.form == "contraction":
        return _launch_of_tiles(source, sizes, rows, columns)
    if source.form in ("attention", "split", "combine"):
        return _launch_of_attention(source, sizes, rows, columns)
    block = min(power_above(columns), BLOCK if source.form == "pointwise" else 2 * BLOCK)
    if source.form == "rows":
        block = power_above(columns)
    together = max(1, min(BLOCK // block, power_above(rows)))
    constants = {"ROWS": together, "BLOCK": block}
    programs = -(-rows // together) if columns else 0
    if source.form == "pointwise":
        programs *= -(-columns // block)
        if not source.loops.rows:
            del constants["ROWS"]
    warps = min(16, max(4, together * block // 512))
    return Launch(programs, constants, warps)


def _launch_of_tiles(source: Source, sizes: Mapping[Dim, int], rows: int, columns: int) -> Launch:
    """Tiles of 128 by 128 at most, of 64 by 64 in single precision, which has no tensor cores; none below 16."""
    single = any(tensor.value.dtype == torch.float32 for tensor in source.reads)
    most, deep = (64, 32) if single else (128, 64)
    high, wide = (min(most, max(16, power_above(size))) for size in (rows, columns))
    tiles = -(-rows // high) * -(-columns // wide) * count(source.loops.batch, sizes)
    depth = min(deep, max(16, power_above(count(source.loops.contracted, sizes))))
    constants = {"BLOCK_M": high, "BLOCK_N": wide, "BLOCK_K": depth, "GROUP": 8}
    return Launch(tiles, constants, 8 if high * wide > 64 * 128 else 4, stages=2 if single else 3)


def _launch_of_attention(source: Source, sizes: Mapping[Dim, int], rows: int, columns: int) -> Launch:
    """Of wide heads, and where masks are read, a program has fewer queries and places at a time, so that none of its
    registers are spilled; a factor of a product is never below 16."""
    width = max(columns, count(source.loops.contracted, sizes))
    of_places = [tensor for tensor in source.reads if tensor.loops(source.loops.source)]
    masks = [tensor for tensor in of_places if tensor.loops(source.loops.rows)]
    more = len(of_places) - len(masks) > 2  # is read of each place than keys and values
    warps = 8
    if any(tensor.value.dtype == torch.float32 for tensor in source.reads):  # which has no tensor cores
        most, deep = (32 if width <= 128 else 16), 32
    elif width <= 64 or width <= 128 and not masks:
        most, deep = MOST_ROWS, 64
    else:
        most, deep, warps = (64, 32, 4) if width <= 128 else (64, 32, 8)
    high = min(16 if source.form == "combine" else most, max(16, power_above(rows)))
    warps = 4 if high == 16 and width <= 128 and not more else warps
    constants = {"BLOCK_M": high, "BLOCK_N": max(16, power_above(columns))}
    programs = -(-rows // high) * count(source.loops.batch, sizes)
    splits = max(2, splits_of(source.loops, sizes))
    if source.form == "combine":
        return Launch(programs, {**constants, "SPLITS": splits}, warps)
    constants |= {"BLOCK_K": max(16, power_above(count(source.loops.contracted, sizes))), "BLOCK_S": deep}
    if source.form == "split":
        constants["SPLITS"], programs = splits, programs * splits
    return Launch(programs, constants, warps, stages=2)


def power_above(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()
