"""What removing whole blocks without fine-tuning leaves of trained networks, refitted and not.

    python benchmarks/depth.py [--write] [--networks char_gpt resnet56] [--windows 256] [--crops 250]

Of a GPT on characters the perplexity over text that it was not trained on, beside the original's; of a residual network
for 32x32 images the share of held-out crops of photographs put into the class that the original puts them in, and the
squared error of the logits as a share of their variance. Layers are refitted on training text, and on crops of the
other halves of the photographs.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import regauge
from benchmarks import char_gpt, cifar_resnet
from benchmarks.prune_networks import Judge
from benchmarks.report import append_table, environment

NETWORKS = ("char_gpt", "resnet56")
HEADS = ["pass", "data", "removed", "parameters", "result", "seconds"]
GPT = (
    ("depth{blocks=1}", False),
    ("depth{blocks=1,compensate=false}", True),
    ("depth{blocks=1}", True),
    ("depth{blocks=2,compensate=false}", True),
    ("depth{blocks=2}", True),
    ("depth{params=0.65,unit=block}", True),
    ("depth{params=0.65}", True),
    ("fuse-blocks{blocks=1}", True),
    ("fuse-blocks{blocks=1,align=true}", True),
    ("fuse-blocks{blocks=2}", True),
)
RESNET = (
    ("depth{blocks=3,score=similarity,compensate=false}", True),
    ("depth{blocks=3,score=similarity}", True),
    ("depth{blocks=3,compensate=false}", True),
    ("depth{blocks=3}", True),
)


def measure(
    name: str,
    graph: regauge.Graph,
    pipelines: Sequence[tuple[str, bool]],
    batches: Sequence[Any],
    result: Callable[[nn.Module], str],
) -> list[list[str]]:
    """One row per pipeline, the original first."""
    rows = [["original", "", "", "100%", result(graph.to_torch().eval()), ""]]
    for pipeline, with_data in pipelines:
        start = time.perf_counter()
        small = regauge.optimize(graph, pipeline, data=batches if with_data else None)
        seconds = time.perf_counter() - start
        entry = small.report.passes[0]
        removed = ", ".join(cut.dim for cut in entry.cuts)
        kept = f"{entry.after.parameters / entry.before.parameters:.1%}"
        found = result(small.to_torch().eval())
        rows.append([pipeline, "yes" if with_data else "no", removed, kept, found, f"{seconds:.0f}"])
        print(name, "  ".join(rows[-1]), flush=True)
    return rows


def character_gpt(windows: int) -> list[list[str]]:
    model = char_gpt.trained()
    graph = regauge.capture(model, (torch.zeros(2, char_gpt.CONTEXT, dtype=torch.int64),), dynamic={0: {0: "batch"}})
    batches = [(part,) for part in char_gpt.calibration_windows(windows).split(32)]
    return measure("char_gpt", graph, GPT, batches, lambda m: f"perplexity {char_gpt.perplexity(m):.3f}")


def residual(depth: int, crops: int) -> list[list[str]]:
    model = cifar_resnet.trained(depth)
    graph = regauge.capture(model, (torch.zeros(2, 3, 32, 32),), dynamic={0: {0: "batch"}})
    batches = [(part,) for part in cifar_resnet.crops(crops, held_out=False).split(50)]
    judge = Judge(model, cifar_resnet.crops(1000, held_out=True))

    def result(found: nn.Module) -> str:
        same, error = judge(found)
        return f"same class {same:.1%}, error {error:.3f}"

    return measure(f"resnet{depth}", graph, RESNET, batches, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=["char_gpt", "resnet20", "resnet56"], default=NETWORKS)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--crops", type=int, default=250)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.networks:
        if name == "char_gpt":
            rows = character_gpt(options.windows)
            note = f"{options.windows} windows of training text; perplexity over the first half of the validation text."
        else:
            rows = residual(int(name.removeprefix("resnet")), options.crops)
            note = f"{options.crops} calibration crops; 1,000 crops of the other halves of the photographs."
        print(environment())
        if options.write:
            append_table(f"Removing blocks without fine-tuning: {name}", HEADS, rows, note)


if __name__ == "__main__":
    main()
