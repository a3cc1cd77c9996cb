"""What a launch takes of Python: of a kernel, in microseconds of the processor, with a driver that launches nothing.

    python benchmarks/kernel_launches.py [--write]

Beside it stands what Triton takes of that, called with arguments that are ready, and the first launch for a shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.report import append_table
from kernel_forms import form_graph
from regauge.backends.triton_kernels.kernel import triton_kernel
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Value

FORMS = ["swiglu", "softmax", "add_rms_norm", "rotary", "int4_weight", "grouped_queries"]
TITLE = "What a launch takes of Python"
HEADS = ["kernel", "tensors", "launch, us", "of these Triton's", "first for a shape, us"]


class Nowhere:
    """A driver of a GPU that is not there: kernels are compiled, but not launched."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

        @staticmethod
        def load_binary(*_: Any) -> tuple[int, int, int, int, int]:
            return 1, 1, 32, 0, 1024

    @staticmethod
    def launcher_cls(*_: Any) -> Callable[..., None]:
        return lambda *arguments: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def microseconds(call: Callable[[], object], times: int = 2000) -> float:
    found = []
    for _ in range(times):
        before = time.thread_time_ns()
        call()
        found.append(time.thread_time_ns() - before)
    return statistics.median(found) / 1e3


def row(name: str) -> list[str]:
    """A form of tests/kernel_forms.py on small tensors."""
    graph = form_graph(name, torch.bfloat16, 64, 128)
    kernel = triton_kernel(trace(graph.nodes, [one for one in graph.outputs if isinstance(one, Value)]), name)
    given = {load.value.value: torch.empty(load.value.value.shape, dtype=load.value.value.dtype)
             for load in kernel.region.loads}  # fmt: skip
    prepared = kernel.prepared(given)
    written = [torch.empty(shape, dtype=value.dtype) for value, shape in prepared.writes]  # type: ignore[arg-type]
    arguments = [*(given[value] for value in prepared.reads), *written, *prepared.numbers]
    (call,) = prepared.calls
    whole = microseconds(lambda: kernel.launch(given))
    own = microseconds(lambda: call.function[call.grid](*arguments, **call.told))
    first = microseconds(lambda: kernel._prepare(given, None), 200)
    return [name, str(len(given) + len(written)), f"{whole:.0f}", f"{own:.0f}", f"{first + whole:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = parser.parse_args()
    driver.set_active(Nowhere())
    rows = []
    for name in FORMS:
        rows.append(row(name))
        print(*rows[-1], sep=" | ", flush=True)
    if given.write:
        note = "`python benchmarks/kernel_launches.py`: microseconds of the processor, medians of 2,000 launches."
        append_table(TITLE, HEADS, rows, note)


if __name__ == "__main__":
    main()
