"""What the character model gives once branches run beside one another, and hidden layers as experts; no fine-tuning.

    python benchmarks/beside.py [--windows 128] [--write]

error        squared change of the outputs, as a share of their squares, on the windows that layers are refitted on
perplexity   over the first half of the validation text; 5.083 whole
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regauge
from benchmarks import char_gpt
from benchmarks.report import append_table, environment
from regauge.ir.cost import figures

HEADS = ["pass", "MACs", "error", "perplexity"]
PASSES = (
    "parallelize{branches=1,compensate=false}",
    "parallelize{branches=1}",
    "parallelize{branches=2,compensate=false}",
    "parallelize{branches=2}",
    "split-experts{experts=8,active=6}",
    "split-experts{experts=8,active=4}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(options.windows)
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    whole, rows = figures(graph).macs, []
    for step in PASSES:
        found = regauge.optimize(graph, step, data=list(windows.split(32)))
        (note,) = [note for note in found.report.passes[0].notes if note.startswith("error of the outputs")]
        error = note.rpartition(": ")[2].replace(" once refitted", "").rpartition(", ")[2]
        perplexity = char_gpt.perplexity(found.to_torch().eval())
        rows.append([f"`{step}`", f"{figures(found).macs / whole:.2f}", error, f"{perplexity:.3f}"])
        print("  ".join(rows[-1]), flush=True)
    print(environment())
    if options.write:
        note = f"`python benchmarks/beside.py`: the character model, 5.083 whole; {options.windows} windows of text."
        append_table("Branches beside one another, hidden layers as experts, no fine-tuning", HEADS, rows, note)


if __name__ == "__main__":
    main()
