"""What kernels take of a GPU, told without one: each form of tests/kernel_forms.py, compiled for two architectures.

    python benchmarks/kernel_resources.py [--write]

Registers of a thread, bytes that it spills, and bytes of shared memory, as ptxas of the installed Triton allocates
them: for 4096 rows of 4096 columns in bfloat16 (and for the longest rows that a program holds, where rows are reduced),
as kernels are launched. Products have a row for 16 rows, too, of which several programs have a part each; a second
kernel adds these up. The exit status is 1 where a kernel spills.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

from benchmarks.report import append_table
from kernel_forms import FORMS, form_graph
from regauge.backends.triton_compile import ARCHITECTURES, Compiled, compile_kernel
from regauge.backends.triton_kernel import Source, triton_kernel
from regauge.backends.triton_loops import count
from regauge.ir.extents import Dim
from regauge.ir.fusion.tracing import trace
from regauge.ir.fusion.traffic import PERSISTENT

ROWS = COLUMNS = 4096
FEW_ROWS = 16
FIGURES = ("registers", "spilled", "shared")
HEADS = ["kernel", "form", "rows", "columns", *(f"{name} {figure}" for name in ARCHITECTURES for figure in FIGURES)]


@dataclass(frozen=True)
class Case:
    """One kernel of a text, for sizes."""

    kernel: str
    source: Source
    rows: int
    sizes: dict[Dim, int]

    def compiled(self, architecture: str) -> Compiled:
        return compile_kernel(self.source, self.sizes, architecture, name=self.kernel)


def cases() -> Iterator[Case]:
    """Each kernel, in each form that it may have at a size."""
    for name in FORMS:
        for rows, columns in ((ROWS, COLUMNS), (ROWS, PERSISTENT), (FEW_ROWS, COLUMNS)):
            graph = form_graph(name, torch.bfloat16, rows, columns)
            region = trace(graph.nodes, graph.outputs)  # type: ignore[arg-type]
            if (columns > COLUMNS) > (region.kind == "row reduction") or (rows < ROWS) > (region.kind == "contraction"):
                continue
            kernel = triton_kernel(region, name)
            sizes = {dim: int(dim.size) for dim in region.sized}
            for form in kernel.forms:
                source = kernel.source(form)
                wanted = form != "rows" or count(source.loops.columns, sizes) <= PERSISTENT
                few = region.kind == "contraction" and rows < ROWS
                if wanted and (region.kind == "attention" or (form == "split") == few):
                    texts = [text for text in (source, source.then) if text is not None]
                    yield from (Case(one, text, rows, sizes) for text in texts for one in text.kernels)


def cells(compiled: Compiled) -> list[str]:
    return [str(compiled.registers), str(compiled.spilled), str(compiled.shared)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    write = parser.parse_args().write
    rows, spills = [], []
    for case in cases():
        found = [case.compiled(architecture) for architecture in ARCHITECTURES]
        columns = str(count(case.source.loops.columns, case.sizes))
        rows.append([case.kernel, case.source.form, str(case.rows), columns, *(c for one in found for c in cells(one))])
        spills += [case.kernel for one in found if one.spilled]
        print(*rows[-1], flush=True)
    if write:
        note = (
            "`python benchmarks/kernel_resources.py`: registers of a thread, bytes that it spills, bytes of shared "
            "memory of a program, in bfloat16."
        )
        append_table("What generated kernels take of a GPU", HEADS, rows, note)
    if spills:
        print(f"these spill registers: {', '.join(dict.fromkeys(spills))}")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
