"""What kernels take of a GPU, told without one: each form of tests/kernel_forms.py, compiled for two architectures.

    python benchmarks/kernel_resources.py [--write]

Registers of a thread, bytes that it spills, and bytes of shared memory, for 4096 rows of 4096 columns in bfloat16 (and
for the longest rows that a program holds, where rows are reduced), as ptxas of the installed Triton allocates them.
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
from regauge.backends.triton_kernel import Source, triton_kernel
from regauge.backends.triton_loops import count
from regauge.ir.extents import Dim
from regauge.ir.fusion.plan import PERSISTENT
from regauge.ir.fusion.region import trace
from region_reference import all_loops

ROWS = COLUMNS = 4096
FIGURES = ("registers", "spilled", "shared")
HEADS = ["kernel", "form", "columns", *(f"{name} {figure}" for name in ARCHITECTURES for figure in FIGURES)]


def cases() -> Iterator[tuple[str, Source, dict[Dim, int]]]:
    """Each kernel, in each form that it may have at a size."""
    for name in FORMS:
        for columns in (COLUMNS, PERSISTENT):
            graph = form_graph(name, torch.bfloat16, ROWS, columns)
            region = trace(graph.nodes, graph.outputs)  # type: ignore[arg-type]
            kernel = triton_kernel(region, name)
            sizes = {dim: int(dim.size) for dim in all_loops(region)}
            for form in kernel.forms:
                source: Source | None = kernel.source(form)
                if form == "rows" and count(kernel.source(form).loops.columns, sizes) > PERSISTENT:
                    continue
                while source is not None:
                    yield name, source, sizes
                    source = source.then
            if region.kind != "row reduction":
                break


def cells(compiled: Compiled) -> list[str]:
    return [str(compiled.registers), str(compiled.spilled), str(compiled.shared)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    write = parser.parse_args().write
    rows = []
    for name, source, sizes in cases():
        found = [compile_kernel(source, sizes, architecture) for architecture in ARCHITECTURES]
        rows.append(
            [name, source.form, str(count(source.loops.columns, sizes)), *(c for one in found for c in cells(one))]
        )
        print(*rows[-1], flush=True)
    if write:
        note = "Registers of a thread, bytes that it spills, bytes of shared memory of a program; bfloat16."
        append_table("What generated kernels take of a GPU", HEADS, rows, note)


if __name__ == "__main__":
    main()
