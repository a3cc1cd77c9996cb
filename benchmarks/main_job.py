"""The main job in one call: what each step leaves of a network, and how its module and its file agree with it.

    python benchmarks/main_job.py [--networks timm:resnet18:32 ...] [--write]

Networks of timm have random weights; they are calibrated on eight images of noise and judged on three others. The
module and the file (in onnxruntime, unoptimised) are compared with the graph as it is interpreted: the greatest
difference over the greatest number. Seconds are the processor's, of one thread, for the step alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

import regauge
from benchmarks.model_case import redraw
from benchmarks.report import append_table
from benchmarks.zoo import build
from main_job_steps import STEPS, Seen
from regauge.backends.run_onnxruntime import Session
from regauge.ir.graph import Graph
from regauge.ir.verify import verify

NETWORKS = ["timm:resnet18:32", "timm:mobilenetv3_small_100:64"]
TITLE = "The main job in one call"
HEADS = ["network", "step", "parameters", "bytes", "MACs", "module", "file", "change of outputs", "seconds"]


def rows(name: str) -> Iterator[list[str]]:
    """Of each step what is left of the original, how both emitted forms agree, and what changed."""
    size = int(name.rsplit(":", 1)[1])
    model = build(f"{name.rsplit(':', 1)[0]}:{max(size, 64)}").model
    redraw(model)
    torch.manual_seed(0)
    graph = regauge.capture(model, (torch.randn(2, 3, size, size),), dynamic={0: {0: "batch"}})
    seen: list[tuple[Graph, float]] = []
    data = [torch.randn(4, 3, size, size) for _ in range(2)]
    start = time.process_time()
    timed = Seen(lambda graph: seen.append((graph, time.process_time())))
    small = regauge.optimize(graph, [one for text in STEPS for one in (text, timed)], data=data)
    before, inputs = small.report.before, torch.randn(3, 3, size, size)
    (whole,) = graph.run(inputs)
    for number, (step, (own, end)) in enumerate(zip(STEPS, seen, strict=True)):
        after = small.report.passes[2 * number].after
        verify(own, axes=True)
        (found,) = own.run(inputs)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = Path(folder) / "step.onnx"
            own.to_onnx(path, verify=False, functions=True)
            emitted = own.to_torch()(inputs), Session(path, optimisation="off").run([inputs])[0]
        shares = [getattr(after, what) / getattr(before, what) for what in ("parameters", "bytes", "macs")]
        off = [float((one - found).abs().max() / found.abs().max()) for one in emitted]
        change = float((found - whole).square().mean() / whole.var())
        yield [
            name,
            step,
            *(f"{share:.2f}" for share in shares),
            *(f"{each:.0e}" for each in off),
            f"{change:.4f}",
            f"{end - start:.0f}",
        ]
        start = end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for name in given.networks:
        for row in rows(name):
            found.append(row)
            print(*row, sep="  ", flush=True)
    if given.write:
        append_table(TITLE, HEADS, found)


if __name__ == "__main__":
    main()
