"""What ``derive`` and ``remat`` do above kernels: MACs, bytes and seconds before and after.

    python benchmarks/rewriting.py [derive] [remat] [--write]

``derive`` runs on ONNX files, which onnxruntime runs before and after in turns with all of its optimisations (medians).
``remat`` runs on captured modules: the peak as it is planned, and as it is measured of all results that the emitted
module makes; inputs and weights are not in the latter. Where OR-Tools is installed, its model runs beside the greedy.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from torch.nn.functional import conv2d

import regauge
from benchmarks.report import append_table
from regauge.backends.latency import measure
from regauge.ir.errors import RegaugeError
from regauge.ir.graph import Graph
from regauge.ir.memory.activations import activation_bytes
from regauge.ir.memory.plan import plan_memory
from regauge.ir.printing.tables import short
from rematerialised import hourglass, training_step
from storage_peak import storage_peak


class Function(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.function(*given)
        return result


class LatentScores(torch.nn.Module):
    """Attention of one new token to keys and values that are computed from latents of low rank."""

    def __init__(self, heads: int = 8, width: int = 64, rank: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.query = torch.nn.Linear(heads * width, heads * width, bias=False)
        self.keys = torch.nn.Linear(rank, heads * width, bias=False)
        self.values = torch.nn.Linear(rank, heads * width, bias=False)

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        parts = [self.query(x), self.keys(latents), self.values(latents)]
        q, k, v = (part.reshape(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in parts)
        scores = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        return (scores @ v).transpose(1, 2).flatten(2)


def expressions() -> Iterator[tuple[str, torch.nn.Module, tuple[torch.Tensor, ...]]]:
    r = torch.randn
    yield (
        "a chain of 4 matmuls",
        Function(lambda a, b, c, d: a @ b @ c @ d),
        (*(r(256, 256) for _ in range(3)), r(256, 8)),
    )
    yield (
        "xa + xb + ya + yb",
        Function(lambda x, y, a, b: x @ a + x @ b + y @ a + y @ b),
        (r(512, 256), r(512, 256), r(256, 256), r(256, 256)),
    )
    yield (
        "einsum of 3",
        Function(lambda a, b, c: torch.einsum("nij,jk,nlk->nil", a, b, c)),
        (r(4, 8, 256), r(256, 256), r(4, 128, 256)),
    )
    yield "1 token, 1024 latents of rank 64", LatentScores(), (r(1, 1, 512), r(1, 1024, 64))
    yield (
        "two 1x1 convolutions added",
        Function(lambda x, a, b: conv2d(x, a) + conv2d(x, b)),
        (r(1, 64, 56, 56), r(64, 64, 1, 1), r(64, 64, 1, 1)),
    )
    layer = torch.nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True)
    yield "an encoder layer", layer, (r(1, 32, 128),)


def derive_rows() -> Iterator[list[str]]:
    for name, module, inputs in expressions():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            graph = regauge.load(regauge.capture(module.eval(), inputs).to_onnx(Path(folder) / "model.onnx"))
        done = regauge.optimize(graph, "derive")
        entry = done.report.passes[0]
        cells = [
            name,
            f"{len(graph.nodes)} -> {len(done.nodes)}",
            f"{short(entry.before.macs)} -> {short(entry.after.macs)}",
        ]
        all_ = [activation_bytes(one)[0] for one in (graph, done)]
        cells.append(f"{short(all_[0])}B -> {short(all_[1])}B")
        before, after = measure([graph, done], list(inputs)) if entry.changed else (None, None)
        times = "-" if before is None or after is None else f"{before.milliseconds:.3g} -> {after.milliseconds:.3g}"
        ratio = "-" if before is None or after is None else f"{after.milliseconds / before.milliseconds:.2f}"
        yield [*cells, times, ratio, f"{entry.seconds:.2f}"]


def remat_rows() -> Iterator[list[str]]:
    solvers = ["greedy", *(["cp-sat"] if importlib.util.find_spec("ortools") else [])]
    for name, (graph, inputs), shares in (
        ("a training step of 6 layers", training_step(6, 64), (0.8, 0.7)),
        ("a training step of 24 layers", training_step(24, 64), (0.8, 0.6, 0.45)),
        ("an hourglass with skips", hourglass(), (0.9, 0.8)),
    ):
        for share in shares:
            for solver in solvers:
                yield [name, f"{share:g}", solver, *_remat_cells(graph, inputs, share, solver)]


def _remat_cells(graph: Graph, inputs: list[torch.Tensor], share: float, solver: str) -> list[str]:
    start = time.perf_counter()
    try:
        done = regauge.optimize(graph, f"remat{{memory={share},solver={solver},seconds=30}}")
    except RegaugeError as error:
        return [str(error).partition(": write")[0], *["-"] * 5]
    seconds, plan = time.perf_counter() - start, plan_memory(done)
    greedily = any("greedily" in note for note in done.report.passes[0].notes)
    measured = [storage_peak(one.to_torch(), *inputs) for one in (graph, done)]
    before, after = measure([graph, done], inputs)
    macs = done.report.passes[0].after.macs / done.report.passes[0].before.macs
    return [
        f"{short(plan_memory(graph).peak)}B -> {short(plan.peak)}B",
        f"{short(plan.arena)}B",
        f"{short(measured[0])}B -> {short(measured[1])}B",
        f"{macs:.2f}",
        f"{after.milliseconds / before.milliseconds:.2f}",
        f"{seconds:.1f}" + (" (none found: greedily)" if greedily else ""),
    ]


DERIVE = ["model", "nodes", "MACs", "bytes of values", "onnxruntime, ms", "ratio", "seconds of the pass"]
REMAT = [
    "model",
    "budget",
    "solver",
    "peak",
    "arena",
    "measured in torch",
    "MACs",
    "time in torch",
    "seconds of the pass",
]


DERIVE_NOTE = (
    "`derive` on ONNX files of random weights; medians of the processor time of runs in turns in onnxruntime, with one "
    "thread and all of its optimisations. Of the encoder layer one permute goes; there is nothing else to choose."
)
REMAT_NOTE = (
    "`remat{memory=BUDGET,solver=SOLVER,seconds=30}` on captured float32 graphs. Peak: of values, as planned, inputs "
    "included; arena: the block that holds the run, offsets greedy by size; measured: the peak of what the emitted "
    "module makes, without inputs, as ATen's dispatcher sees it. MACs and the time of the emitted module are ratios "
    "to the model as it was; a training step is its gradients, weights among the inputs. OR-Tools 9.15.6755."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="derive, remat; both where none is named")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name, rows, heads, title, note in (
        ("derive", derive_rows, DERIVE, "Sums of products in another order", DERIVE_NOTE),
        ("remat", remat_rows, REMAT, "Memory of a run within a budget", REMAT_NOTE),
    ):
        if given.what and name not in given.what:
            continue
        found = []
        for row in rows():
            found.append(row)
            print(*row, sep=" | ", flush=True)
        if given.write:
            append_table(title, heads, found, note)


if __name__ == "__main__":
    main()
