"""What kernels take of a GPU, told without one: each form of tests/kernel_forms.py, compiled for two architectures.

    python benchmarks/kernel_resources.py [--write]

Registers of a thread, bytes that it spills, and bytes of shared memory, as ptxas of the installed Triton allocates
them: for 4096 rows of 4096 columns in bfloat16 (and for the longest rows that a program holds, where rows are reduced;
and for 16 rows, where there is a product), with the shipped configurations. The exit status is 1 where a kernel spills.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

from benchmarks.report import append_table
from kernel_forms import FORMS, form_graph
from regauge.backends.triton_compile import ARCHITECTURES, Compiled, compile_kernel
from regauge.backends.triton_kernel import Source, case_of, triton_kernel
from regauge.backends.triton_loops import count
from regauge.ir.extents import Dim
from regauge.ir.fusion.plan import PERSISTENT
from regauge.ir.fusion.region import trace

ROWS = COLUMNS = 4096
FEW = 16
FIGURES = ("registers", "spilled", "shared")
HEADS = ["kernel", "form", "rows", "columns", *(f"{name} {figure}" for name in ARCHITECTURES for figure in FIGURES)]


def cases() -> Iterator[tuple[str, Source, dict[Dim, int]]]:
    """Each kernel, in each form that it may have at a size."""
    for name in FORMS:
        for rows, columns in ((ROWS, COLUMNS), (ROWS, PERSISTENT), (FEW, COLUMNS)):
            graph = form_graph(name, torch.bfloat16, rows, columns)
            region = trace(graph.nodes, graph.outputs)  # type: ignore[arg-type]
            if (rows, columns) != (ROWS, COLUMNS) and region.kind != (
                "contraction" if rows == FEW else "row reduction"
            ):
                continue
            kernel = triton_kernel(region, name)
            sizes = {dim: int(dim.size) for dim in region.every_loop}
            for form in kernel.forms:
                source = kernel.source(form)
                if form != "rows" or count(source.loops.columns, sizes) <= PERSISTENT:
                    yield name, source, sizes


def cells(compiled: Compiled) -> list[str]:
    return [str(compiled.registers), str(compiled.spilled), str(compiled.shared)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    write = parser.parse_args().write
    rows, spills = [], []
    for name, source, sizes in cases():
        found = [compile_kernel(source, sizes, architecture) for architecture in ARCHITECTURES]
        counts = [str(size) for size in case_of(source, sizes).sizes[:2]]
        rows.append([name, source.form, *counts, *(c for one in found for c in cells(one))])
        spills += [name for one in found if one.spilled]
        print(*rows[-1], flush=True)
    if write:
        note = (
            "`python benchmarks/kernel_resources.py`: registers of a thread, bytes that it spills, bytes of shared "
            "memory of a program, in bfloat16 with the shipped configurations."
        )
        append_table("What generated kernels take of a GPU", HEADS, rows, note)
    if spills:
        print(f"these spill registers: {', '.join(dict.fromkeys(spills))}")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
