"""Kernels of regions: ``triton_kernel(region)`` gives readable Triton source and how it is launched.

    kernel = triton_kernel(region, "add_norm")
    print(kernel.source)
    results = kernel.launch({value: tensor, ...})      a tensor for each result of the region

The text is the same for all sizes. Sources are made where they are first needed: one for tensors whose axes lie one
behind the other in memory, one for any strides, and of reductions each at once or in a loop, by the length of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias, cast

import torch

from regauge.backends.torch_module.runtime import import_source
from regauge.backends.triton_kernels.attention import AttentionForm, AttentionKernel
from regauge.backends.triton_kernels.attention_gradient import BIAS_FORMS, WIDE_FORMS, GradientForm
from regauge.backends.triton_kernels.attention_sizes import (
    launch_of_attention,
    launch_of_bias,
    launch_of_gradient,
    launch_of_total,
    scratch_sizes,
    splits_of,
)
from regauge.backends.triton_kernels.configs import Case, Config, Table, architecture_of, config_of
from regauge.backends.triton_kernels.contraction import ContractionKernel
from regauge.backends.triton_kernels.launch import Launch, power_above
from regauge.backends.triton_kernels.loops import (
    Loop,
    Loops,
    Tensor,
    check_counted,
    count,
    fits,
    sizes_of,
    start_of,
    strides_of,
    widths,
)
from regauge.backends.triton_kernels.prepared import MOST_PREPARED, Call, Key, Prepared, key_of
from regauge.backends.triton_kernels.row_sizes import holds_rows, tile_of_rows
from regauge.backends.triton_kernels.rows import ROW_FORMS, RowForm, RowKernel
from regauge.backends.triton_kernels.source import Rounding
from regauge.backends.triton_kernels.split import TOTAL, SplitKernel
from regauge.backends.triton_kernels.tile_sizes import launch_of_tiles, multiplies_float8, parts_of
from regauge.backends.triton_kernels.tiles import Tiling
from regauge.ir.dims.extents import Dim
from regauge.ir.errors import FusionError
from regauge.ir.fusion.legality import fault
from regauge.ir.fusion.region import Kind, Layout, Region
from regauge.ir.fusion.traffic import PERSISTENT
from regauge.ir.graph import Value

MOST_SUMMED = 264
"""Programs that share out rows over which sums go: enough to keep a device busy, and few parts to be added up then."""

Form: TypeAlias = RowForm | Literal["contraction"] | AttentionForm | GradientForm
_FORMS: Mapping[Kind, tuple[Form, ...]] = {
    "pointwise": ("pointwise",),
    "row reduction": ("rows", "looped"),
    "contraction": ("contraction", "split"),
    "attention": ("attention", "split"),
}


@dataclass(frozen=True, eq=False)
class Source:
    """One text of a kernel: what it reads and writes in the order of its arguments, and its loops; of a contraction
    what decides how large tiles are.

    ``scratch`` are names of what attention hands on to the kernel that runs ``then``; of ``totals`` each program leaves
    a part, with an entry for each index of the columns.
    """

    text: str
    name: str
    form: Form
    rounding: Rounding
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    loops: Loops
    tiling: Tiling | None = None
    scratch: tuple[str, ...] = ()
    then: Source | None = None
    totals: tuple[Tensor, ...] = ()

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the kernels that the text has, which are launched one after the other."""
        return (self.name, f"{self.name}{TOTAL}") if self.form == "split" and self.tiling else (self.name,)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.reads, *self.writes)

    @property
    def shared_out(self) -> bool:
        """Whether programs share out columns, too, since no row is reduced."""
        return self.form in ("pointwise", "swept")

    def function(self, name: str | None = None) -> Any:
        """A kernel, by default the first one, as Triton has it; raises FusionError where Triton is not installed."""
        try:
            return getattr(import_source(self.text, self.name), name or self.name)
        except ModuleNotFoundError as error:
            raise FusionError("kernels need Triton: pip install 'regauge[triton]'") from error


@dataclass(eq=False)
class Kernel:
    """The kernel of one region; make one with :func:`triton_kernel`."""

    region: Region
    name: str
    rounding: Rounding
    tuned: Table | None = None
    _sources: dict[tuple[Form, bool], Source] = field(default_factory=dict, init=False)
    _outlines: dict[Form, Source] = field(default_factory=dict, init=False)
    _prepared: dict[Key, Prepared] = field(default_factory=dict, init=False)

    def source(self, form: Form | None = None, *, contiguous: bool = True) -> Source:
        """The text of a form, by default of rows at once, for axes one behind the other or for any strides."""
        form = self.forms[0] if form is None else form
        if form not in self.forms:
            raise FusionError(f"kernel {self.name} is {' or '.join(self.forms)}, not {form}")
        if (form, contiguous) not in self._sources:
            self._sources[form, contiguous] = self._write(form, contiguous)
        return self._sources[form, contiguous]

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        if self.region.totals:
            return ("summed",)
        return ("swept",) if self.region.has_windows else _FORMS[self.region.kind]

    def form_for(self, sizes: Mapping[Dim, int], *, single: bool = False) -> Form:
        """The form for these sizes: rows that a program cannot hold are reduced in a loop, and tiles that are too few
        to keep a device busy are shared out, which takes two kernels, and is not done for a ``single`` one."""
        form, source = self.forms[0], self.outline(self.forms[0])
        if form == "rows":
            long = count(source.loops.columns, sizes) > PERSISTENT
            return "looped" if long or not holds_rows(source.loops, case_of(source, sizes)) else form
        if single or form not in ("contraction", "attention"):
            return form
        parts = parts_of(source.loops, source.tiling, sizes) if source.tiling else splits_of(source.loops, sizes)
        return "split" if parts > 1 else form

    def outline(self, form: Form) -> Source:
        """What a form reads, writes and goes through, without the text."""
        if form not in self._outlines:
            self._outlines[form] = self._write(form, contiguous=True, text=False)
        return self._outlines[form]

    def _write(self, form: Form, contiguous: bool, *, text: bool = True) -> Source:
        region, name, rounding = self.region, self.name, self.rounding
        writer: RowKernel | ContractionKernel | AttentionKernel
        tiling, scratch, then = None, tuple[str, ...](), None
        totals: tuple[Tensor, ...] = ()
        if form == "attention" or form == "combine" or form == "split" and self.region.attention is not None:
            writer = AttentionKernel(region, name, form, contiguous=contiguous)
            name, scratch = writer.name_of_kernel, writer.scratch
            then = self._write("combine", contiguous, text=text) if form == "split" else None
        elif form == "contraction" or form == "split":
            kind = ContractionKernel if form == "contraction" else SplitKernel
            writer = kind(region, name, rounding, contiguous=contiguous)
            tiling = writer.tiling
        else:
            writer = RowKernel(region, name, cast(RowForm, form), rounding, contiguous=contiguous)
            totals = tuple(writer.totals)
        reads, writes = tuple(writer.reads), tuple(writer.writes)
        made = writer.source() if text else ""
        return Source(made, name, form, rounding, reads, writes, writer.loops, tiling, scratch, then, totals)

    def scratch(self, source: Source, sizes: Mapping[Dim, int], start: Launch, architecture: str) -> list[int]:
        """How many numbers the kernels of a source hand on, in each piece of memory."""
        return scratch_sizes(source.form, source.loops, sizes, start.constants.get("SPLITS", 1))

    def launch(self, given: Mapping[Value, torch.Tensor], form: Form | None = None) -> dict[Value, torch.Tensor]:
        """The results of the region for the tensors that it reads, on their device; ``form`` None: by the sizes."""
        return self.prepared(given, form).run(given)

    def prepared(self, given: Mapping[Value, torch.Tensor], form: Form | None = None) -> Prepared:
        """The launch for tensors of these shapes and strides. Raises FusionError where they do not fit one another."""
        key = form, *key_of([given[tensor.value] for tensor in self.source(form).reads])
        if key not in self._prepared:
            if len(self._prepared) >= MOST_PREPARED:
                self._prepared.clear()
            self._prepared[key] = self._prepare(given, form)
        return self._prepared[key]

    def _prepare(self, given: Mapping[Value, torch.Tensor], form: Form | None) -> Prepared:
        source = self.source(form)
        sizes = sizes_of(self.region, source.reads, given)
        source = source if form else self.source(self.form_for(sizes))
        steps = {tensor: strides_of(tensor, given[tensor.value], sizes) for tensor in source.reads}
        if not all(fits(loop, steps[t], sizes) for t in source.reads for loop in t.loops(source.loops.all)):
            source = self.source(source.form, contiguous=False)
            steps = {tensor: strides_of(tensor, given[tensor.value], sizes) for tensor in source.reads}
        device = given[source.reads[0].value].device
        architecture = architecture_of(device)
        shapes = [(tensor, shape_of(tensor.layout, sizes)) for tensor in source.writes]
        for tensor, shape in shapes:
            steps[tensor] = strides_of(tensor, torch.empty(shape, device="meta"), sizes)
        start = launch_of(source, sizes, config_for(source, sizes, architecture, self.tuned), architecture)
        scratch = [start.partials] if start.partials else []
        if source.scratch:
            scratch += self.scratch(source, sizes, start, architecture)
        starts = [start_of(t, given[t.value], sizes) for t in source.reads if t.shifts]
        return Prepared(
            sizes,
            device,
            tuple(tensor.value for tensor in source.reads),
            tuple((tensor.value, shape) for tensor, shape in shapes),
            tuple((t, [start.programs, start.kept], shape_of(t.layout, sizes)) for t in source.totals),
            tuple(scratch),
            numbers(source, sizes, starts, steps),
            tuple(_calls(source, start, sizes, architecture)),
        )


def _calls(source: Source, start: Launch, sizes: Mapping[Dim, int], architecture: str) -> Iterator[Call]:
    """The kernels of a source, then of those behind it: their arguments are the same. None where there is nothing."""
    if not start.programs:
        return
    following: Source | None = source
    while following is not None:
        if start.programs:
            told = {**start.constants, **start.options(following.rounding)}
            for name, grid in zip(following.kernels, start.grids, strict=True):
                yield Call(following.function(name), grid, told)
        following = following.then
        if following is not None:
            start = launch_of(following, sizes, None, architecture)


def triton_kernel(
    region: Region, name: str = "kernel", *, rounding: Rounding = "fused", tuned: Table | None = None
) -> Kernel:
    """The kernel of a region; raises FusionError where it can be none.

    ``rounding`` is part of what it computes: ``fused`` rounds results once, ``eager`` whatever a node gives. ``tuned``
    is a table of configurations that is asked before the shipped one.
    """
    reason = fault(region)
    if reason is not None:
        raise FusionError(f"{name}: {reason}")
    if region.attention is not None and rounding == "eager":
        raise FusionError(f"{name}: attention in one pass rounds what it gives, not each of its nodes")
    if not name.isidentifier():
        raise FusionError(f"a kernel cannot be called {name!r}: give a name that Python can have")
    return Kernel(region, name, rounding, tuned)


def shape_of(layout: Layout, sizes: Mapping[Dim, int]) -> list[int]:
    return [math.prod(sizes[dim] for dim in axis) for axis in layout]


def numbers(
    source: Source, sizes: Mapping[Dim, int], starts: Sequence[int], steps: Mapping[Tensor, Mapping[Dim, int]]
) -> list[int]:
    """The arguments behind the pointers: sizes of loops, where tensors begin, then their steps along loops."""
    loops = source.loops.all
    found = [*(loop.size(sizes) for loop in source.loops.sized), *starts]
    for tensor in source.tensors:
        found += [steps[tensor][loop.dims[-1]] for loop in tensor.loops(loops)]
        found += [steps[tensor][dim] for dim in tensor.picked]
    return found


def case_of(source: Source, sizes: Mapping[Dim, int]) -> Case:
    """What the configuration of a kernel is looked up by."""
    single = any(tensor.value.dtype == torch.float32 for tensor in source.reads)
    parts = (source.loops.rows, source.loops.columns, source.loops.contracted)
    rows, columns, contracted = (count(loops, sizes) for loops in parts)
    columns = sum(widths(source.loops, sizes))
    # Windows are swept by programs that are cut alike, and blocks of rows are cut as where a program has but one.
    form = "pointwise" if source.shared_out else "rows" if source.form == "summed" else source.form
    return Case(form, "single" if single else "half", (rows, columns, contracted))


def config_for(
    source: Source, sizes: Mapping[Dim, int], architecture: str, tuned: Table | None = None
) -> Config | None:
    """The configuration for given sizes; None for tiles that no table holds (:mod:`triton_tile_sizes`, and
    :mod:`triton_attention_sizes`)."""
    if (
        source.form in ("split", "attention", "combine", *WIDE_FORMS, *BIAS_FORMS)
        or source.tiling is not None
        and not source.tiling.plain
    ):
        return None
    return config_of(case_of(source, sizes), architecture, tuned)


def launch_of(source: Source, sizes: Mapping[Dim, int], config: Config | None, architecture: str = "") -> Launch:
    """How a kernel is started for given sizes: tiles of the configuration, smaller where there is less."""
    if source.form not in ROW_FORMS:
        check_counted(source.name, source.loops, sizes)
    if config is None and source.tiling is not None:
        native = multiplies_float8(architecture)
        return launch_of_tiles(source.loops, source.tiling, sizes, split=source.form == "split", float8=native)
    if source.form == "of_bias":
        return launch_of_bias(source.reads, source.writes[0], source.loops, sizes, architecture)
    if source.form == "total":
        return launch_of_total(source.reads, source.writes[0], source.loops, sizes, architecture)
    if source.form in WIDE_FORMS:
        return launch_of_gradient(cast(GradientForm, source.form), source.reads, source.loops, sizes)
    if config is None:
        assert source.form == "attention" or source.form == "split" or source.form == "combine"
        return launch_of_attention(source.form, source.reads, source.loops, sizes, architecture)
    case = case_of(source, sizes)
    (rows, columns, contracted), tile, warps = case.sizes, config.tile, config.warps
    if source.form == "contraction":
        columns = max(widths(source.loops, sizes))
        high, wide = (min(tile[n], max(16, power_above(m))) for n, m in (("BLOCK_M", rows), ("BLOCK_N", columns)))
        if (high, wide) != (tile["BLOCK_M"], tile["BLOCK_N"]):
            warps = min(warps, max(4, high * wide // 2048))
        depth = min(tile["BLOCK_K"], max(16, power_above(contracted)))
        constants = {"BLOCK_M": high, "BLOCK_N": wide, "BLOCK_K": depth, "GROUP": tile["GROUP"]}
    else:
        form = cast(RowForm, source.form)
        constants, warps = tile_of_rows(form, source.loops, source.tensors, config, case)
        if source.shared_out and not source.loops.rows:
            del constants["ROWS"]
    grid = grid_of(source, constants)
    programs = math.prod(sum(-(-count(loops, sizes) // per) for loops, per in factor) for factor in grid)
    kept = columns if source.totals else 0
    programs = min(programs, MOST_SUMMED) if source.totals else programs
    return Launch(programs, constants, warps, config.stages, kept=kept)


def grid_of(source: Source, constants: Mapping[str, int]) -> list[list[tuple[tuple[Loop, ...], int]]]:
    """How many programs there are: a product of sums of sizes of loops, each divided by a number and rounded up."""
    loops = source.loops
    if source.form == "contraction":
        columns = [(part, constants["BLOCK_N"]) for part in loops.parts or [loops.columns]]
        return [[(loops.rows, constants["BLOCK_M"])], columns, [(loops.batch, 1)]]
    if source.form == "attention":
        wide = math.prod(int(dim.size) for loop in loops.columns for dim in loop.dims) > constants["BLOCK_N"]
        blocks = [[(loops.columns, constants["BLOCK_N"])]] if wide else []
        return [[(loops.rows, constants["BLOCK_M"])], [(loops.batch, 1)], *blocks]
    grid = [[(loops.rows, constants.get("ROWS", 1))]]
    return [*grid, [(loops.columns, constants["BLOCK"])]] if source.shared_out else grid
