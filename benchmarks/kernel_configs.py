"""The shipped table of kernel configurations, backends/triton_kernels/configs.json: screened without a GPU.

    python benchmarks/kernel_configs.py [--write] [--only contraction]

For each architecture, form, type and size the configuration that the model of backends/triton_kernels/screen.py likes
best among those that compile without spilling: of the sample of the form, and of the kernels of tests/kernel_forms.py
below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

from kernel_forms import form_graph
from regauge.backends.triton_kernels.configs import SHIPPED, Case, Entry, Table, shipped
from regauge.backends.triton_kernels.kernel import Form, triton_kernel
from regauge.backends.triton_kernels.samples import Sizes, sample
from regauge.backends.triton_kernels.screen import GPUS, Sized, screen
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Value

SIZES: dict[Form, list[Sizes]] = {
    "pointwise": [(16, 4096, 1), (256, 4096, 1), (4096, 4096, 1)],
    "rows": [(4096, 512 * 2**n, 1) for n in range(6)],
    "looped": [(16, 65536, 1), (4096, 65536, 1)],
    "contraction": [(rows, columns, 4096) for rows in (16, 64, 256, 4096) for columns in (128, 1024, 8192)],
}
ALSO = {
    "pointwise": ["broadcast"],
    "rows": ["gated_rms_norm", "masked_softmax"],
    "looped": ["gated_rms_norm", "masked_softmax"],
    "contraction": ["gated_product"],
}
"""Kernels that must not spill, either."""
NUMBERS = {"half": torch.bfloat16, "single": torch.float32}
NOTE = "made by benchmarks/kernel_configs.py: screened without a GPU, not measured"


def also(name: str, form: Form, sizes: Sizes, dtype: torch.dtype) -> Sized:
    rows, columns, contracted = sizes
    graph = form_graph(name, dtype, rows, contracted if form == "contraction" else columns)
    region = trace(graph.nodes, [value for value in graph.outputs if isinstance(value, Value)])
    return triton_kernel(region, name).source(form), {dim: int(dim.size) for dim in region.sized}


def entries(only: Form | None) -> Iterator[Entry]:
    for form in SIZES if only is None else [only]:
        for architecture in GPUS:
            for numbers, dtype in NUMBERS.items():
                for sizes in SIZES[form]:
                    kernel, loops = sample(form, sizes, str(dtype).removeprefix("torch."))
                    kernels = [(kernel.source(form), loops)]
                    kernels += [also(name, form, sizes, dtype) for name in ALSO[form]]
                    best = screen(kernels, architecture)[0]
                    entry = Entry(architecture, Case(form, numbers, sizes), best.config)
                    print(architecture, form, numbers, sizes, best.config, f"{best.seconds * 1e6:.1f} us", flush=True)
                    yield entry


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="replace the shipped table")
    parser.add_argument("--only", choices=SIZES, help="one form; the others stay as they are")
    given = parser.parse_args()
    made = list(entries(given.only))
    kept = [entry for entry in shipped().entries if given.only not in (None, entry.case.form)]
    if given.write:
        order: dict[str, int] = {form: place for place, form in enumerate(SIZES)}
        whole = sorted([*kept, *made], key=lambda entry: (entry.architecture, order[entry.case.form]))
        Table(whole).write(SHIPPED, NOTE)


if __name__ == "__main__":
    main()
