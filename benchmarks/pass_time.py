"""What a pass takes of one core, on networks of full width with random weights, and the most memory it had.

    python benchmarks/pass_time.py [NETWORK ...] [--passes factorize{params=0.8}] [--examples 8] [--write]

Networks are those of timm, ``timm:resnet50:64`` with the size of its images; examples are noise, and with 0 there is no
data. Time is the processor's, of one thread; memory that of the whole process at its peak. Each network runs in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regauge
from benchmarks.model_case import redraw
from benchmarks.report import append_table
from benchmarks.zoo import build

NETWORKS = ["timm:resnet18:32", "timm:resnet50:64", "timm:vit_base_patch16_224:224"]
TITLE = "Time of passes on networks of full width"
HEADS = ["network", "pass", "examples", "seconds of one core", "peak memory", "cuts", "error of outputs"]


def measured(name: str, text: str, examples: int) -> list[str]:
    """A row of the table."""
    torch.set_num_threads(1)
    size = int(name.rsplit(":", 1)[1])
    model = build(name if size >= 64 else f"{name.rsplit(':', 1)[0]}:64").model
    redraw(model)
    torch.manual_seed(0)
    graph = regauge.capture(model, (torch.randn(2, 3, size, size),), dynamic={0: {0: "batch"}})
    graph = regauge.optimize(graph, "simplify")
    data = [torch.randn(min(4, examples - at), 3, size, size) for at in range(0, examples, 4)]
    start = time.process_time()
    small = regauge.optimize(graph, text, data=data or None)
    taken = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    inputs = torch.randn(4, 3, size, size)
    (before,), (after,) = graph.run(inputs), small.run(inputs)
    error = float((before - after).square().mean() / before.var())
    cuts = len(small.report.passes[0].cuts)
    return [name, text, str(examples), f"{taken:.0f}", f"{peak:.1f} GB", str(cuts), f"{error:.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--passes", nargs="*", default=["factorize{params=0.8}"], metavar="PASS")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--one", action="store_true", help="print the row of the one network and pass")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.one:
        print(json.dumps(measured(given.networks[0], given.passes[0], given.examples)))
        return
    rows = []
    for name, text in product(given.networks or NETWORKS, given.passes):
        own = [sys.executable, __file__, name, "--one", "--passes", text, "--examples", str(given.examples)]
        found = subprocess.run(own, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(found.splitlines()[-1]))
        print(*rows[-1], sep="  ", flush=True)
    if given.write:
        append_table(TITLE, HEADS, rows)


if __name__ == "__main__":
    main()
