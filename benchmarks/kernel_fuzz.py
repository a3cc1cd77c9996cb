"""Random regions as kernels in Triton's interpreter, each held to the contract of kernels against double precision.

    python benchmarks/kernel_fuzz.py [--count 1000] [--first 1] [--write]

The graphs are those of tests/random_regions.py, in single, half and brain floating point, with both ways to round and
in every form that a kernel has, drawn by hypothesis in parts of 25, each from a seed of its own, ``first`` and on:
parts may be shared out among processes, and be run again. With ``PYTHONPATH`` another Triton is tried. The exit status
is 1 where a kernel breaks the contract; the region is printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "backends" / "triton_kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if "TRITON_INTERPRET" not in os.environ:  # it is read where Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import interpreted_kernels as kernels
import triton
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.report import append_table
from regauge.ir.dtypes import dtype_name
from regauge.ir.graph import Graph

PART = 25
"""Regions that are drawn from one seed."""

HEADS = ("triton", "regions", "violations", "by type of inputs", "seconds of the processor")


def checked(number: int, types: Counter[str]) -> bool:
    """Draw and check one part; whether all of it keeps the contract."""

    @seed(number)
    @settings(
        max_examples=PART, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @given(kernels.every_region(), st.sampled_from(kernels.ROUNDINGS), st.integers(0, 99))
    def check(graph: Graph, rounding: Any, numbers: int) -> None:
        types[dtype_name(graph.inputs[0].dtype)] += 1
        kernels.check_random(graph, rounding, numbers)

    try:
        check()
    except Exception:
        traceback.print_exc()
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="regions to draw, in parts of 25")
    parser.add_argument("--first", type=int, default=1, help="the seed of the first part")
    parser.add_argument("--write", action="store_true", help="write the table to docs/benchmarks.md")
    options = parser.parse_args()
    types: Counter[str] = Counter()
    broken = 0
    for number in range(options.first, options.first - (-options.count // PART)):
        broken += not checked(number, types)
        print(f"{types.total()} regions, {broken} parts broken", flush=True)
    by_type = ", ".join(f"{count} {name}" for name, count in sorted(types.items()))
    row = (triton.__version__, str(types.total()), str(broken), by_type, f"{time.process_time():.0f}")
    print(" | ".join(row))
    if options.write:
        append_table("Random regions as kernels", HEADS, [row])
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
