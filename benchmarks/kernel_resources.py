"""What kernels take of a GPU, told without one: each form of tests/kernel_forms.py, compiled for two architectures.

    python benchmarks/kernel_resources.py [--only NAME ...] [--write] [--versions]

Registers of a thread, bytes that it spills, and bytes of shared memory, as ptxas of the installed Triton allocates
them: for 4096 rows of 4096 columns in bfloat16 (and for the longest rows that a program holds, where rows are reduced),
as kernels are launched. Losses have the rows of a large vocabulary, too (MORE); products have a row for 16 rows, of
which several programs have a part each; a second kernel adds these up. Behind them are the gradients of some forms
(GRADIENTS). With ``--only`` the rows of these forms take the place of those that the table has. What spills depends on
the compiler, too: ``--versions`` puts the figures of the installed Triton beside those of others (with another one
first on PYTHONPATH it is that one; what was compiled lies in Triton's cache, so that a run that was stopped goes on).
The exit status is 1 where a kernel spills.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

from benchmarks.report import DOCUMENT, append_table
from kernel_forms import FORMS, form_graph
from regauge.backends.to_torch import to_torch
from regauge.backends.torch_module.kernels import kernel_operator
from regauge.backends.triton_kernels.compile import ARCHITECTURES, Compiled, compile_kernel
from regauge.backends.triton_kernels.kernel import Source, triton_kernel
from regauge.backends.triton_kernels.loops import count
from regauge.ir.dims.extents import Dim
from regauge.ir.edit import Builder
from regauge.ir.fusion.fuse import fuse
from regauge.ir.fusion.fused import body_of, canonical
from regauge.ir.fusion.legality import WIDEST_TOTALS
from regauge.ir.fusion.tracing import trace
from regauge.ir.fusion.traffic import PERSISTENT

ROWS = COLUMNS = 4096
FEW_ROWS = 16
MORE = {
    **dict.fromkeys(("cross_entropy", "smooth_cross_entropy", "weighted_cross_entropy"), (8192, 131072)),
    **dict.fromkeys(("layer_norm", "add_rms_norm"), (4096, WIDEST_TOTALS)),
}
"""Rows and columns that forms, and their gradients, have beside those of all."""
FIGURES = ("registers", "spilled", "shared")
TITLE = "What generated kernels take of a GPU"
GRADIENTS = (
    "swiglu", "masked_softmax", "layer_norm", "add_rms_norm", "cross_entropy", "smooth_cross_entropy",
    "causal_attention", "masked_attention", "capped_attention", "position_bias_attention", "sloped_attention",
    "large_heads_attention",
)  # fmt: skip
"""Forms whose gradients have kernels of several kinds: pointwise, rows, sums over rows, and attention."""

VERSIONS = "What generated kernels spill, by version of Triton"
VERSION_HEADS = ["Triton", "architecture", "kernels", "that spill", "bytes spilled", "most registers", "date"]

HEADS = ["kernel", "form", "rows", "columns", *(f"{name} {figure}" for name in ARCHITECTURES for figure in FIGURES)]


@dataclass(frozen=True)
class Case:
    """One kernel of a text, for sizes; ``label`` is what the table calls it."""

    label: str
    kernel: str
    source: Source
    rows: int
    sizes: dict[Dim, int]

    def compiled(self, architecture: str) -> Compiled:
        return compile_kernel(self.source, self.sizes, architecture, name=self.kernel)


def cases(names: Sequence[str]) -> Iterator[Case]:
    """Each kernel, in each form that it may have at a size."""
    for name in names:
        more = [MORE[name]] if name in MORE else []
        for rows, columns in dict.fromkeys([(ROWS, COLUMNS), (ROWS, PERSISTENT), (FEW_ROWS, COLUMNS), *more]):
            graph = form_graph(name, torch.bfloat16, rows, columns)
            region = trace(graph.nodes, graph.outputs)
            if (columns > COLUMNS) > (region.kind == "row reduction") or (rows < ROWS) > (region.kind == "contraction"):
                continue
            kernel = triton_kernel(region, name)
            sizes = {dim: int(dim.size) for dim in region.sized}
            for form in kernel.forms:
                source = kernel.source(form)
                wanted = form != "rows" or kernel.form_for(sizes) == "rows"
                few = region.kind == "contraction" and rows < ROWS
                if wanted and (region.kind == "attention" or (form == "split") == few):
                    texts = [text for text in (source, source.then) if text is not None]
                    yield from (Case(one, one, text, rows, sizes) for text in texts for one in text.kernels)


def gradient_cases(names: Sequence[str]) -> Iterator[Case]:
    """The kernels of gradients, which are launched one after the other."""
    sizes_of = {name: [(ROWS, COLUMNS), *([MORE[name]] if name in MORE else [])] for name in names}
    for name, (rows, columns) in ((name, one) for name, each in sizes_of.items() for one in each):
        graph = form_graph(name, torch.bfloat16, rows, columns)
        node = fuse(Builder(graph), trace(graph.nodes, graph.outputs), "fused")
        body = canonical(body_of(node))
        for _, operator in kernel_operator(body, "fused", to_torch(body)).backward:
            kernel = operator.kernel
            sizes = {dim: int(dim.size) for dim in kernel.region.sized}
            source: Source | None = kernel.source(kernel.form_for(sizes))
            while source is not None:
                for one in source.kernels:
                    yield Case(f"{name}_gradient", one, source, rows, sizes)
                source = source.then


def merged(title: str, rows: Sequence[list[str]]) -> list[list[str]]:
    """The rows of a table in the document, with these in place of those of the same kernels, or versions."""
    parts = DOCUMENT.read_text(encoding="utf-8").split("\n## ")
    lines = [line for part in parts if part.startswith(title + "\n") for line in part.splitlines()]
    known = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")][1:]
    new = {row[0] for row in rows}
    return [*(row for row in known if row[0] not in new), *rows]


def write_versions(rows: Sequence[list[str]]) -> None:
    """Put what the installed Triton makes of all kernels into the table of versions: a row for each architecture."""
    new, width = [], len(FIGURES)
    for place, architecture in enumerate(ARCHITECTURES):
        found = [[int(cell) for cell in row[4 + place * width :][:width]] for row in rows]
        spilled = [bytes_ for _, bytes_, _ in found if bytes_]
        figures = [len(found), len(spilled), sum(spilled), max(registers for registers, *_ in found)]
        new.append([version("triton"), architecture, *map(str, figures), datetime.date.today().isoformat()])
    note = (
        "`python benchmarks/kernel_resources.py --versions`: the kernels of the table above, by each supported version."
    )
    append_table(VERSIONS, VERSION_HEADS, sorted(merged(VERSIONS, new)), note)


def cells(compiled: Compiled) -> list[str]:
    return [str(compiled.registers), str(compiled.spilled), str(compiled.shared)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument("--versions", action="store_true", help="put a row for this Triton there, too: of all forms")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="forms, by default all; their gradients, too")
    arguments = parser.parse_args()
    write, names = arguments.write, arguments.only or [*FORMS]
    if arguments.versions and arguments.only:
        parser.error("--versions is for all forms: leave out --only")
    rows, spills = [], []
    for case in chain(cases(names), gradient_cases([name for name in names if name in GRADIENTS])):
        found = [case.compiled(architecture) for architecture in ARCHITECTURES]
        columns = str(count(case.source.loops.columns, case.sizes))
        rows.append([case.label, case.source.form, str(case.rows), columns, *(c for one in found for c in cells(one))])
        spills += [case.label for one in found if one.spilled]
        print(*rows[-1], flush=True)
    if write:
        note = (
            "`python benchmarks/kernel_resources.py`: registers of a thread, bytes that it spills, bytes of shared "
            "memory of a program, in bfloat16."
        )
        append_table(TITLE, HEADS, merged(TITLE, rows) if arguments.only else rows, note)
    if arguments.versions:
        write_versions(rows)
    if spills:
        print(f"these spill registers: {', '.join(dict.fromkeys(spills))}")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
