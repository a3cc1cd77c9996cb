"""What is left of the character model once its blocks have weights in common, with and without one basis and data.

    python benchmarks/share.py [--examples 64] [--only TEXT ...] [--write]

perplexity   5.083 whole; parameters and MACs are those without data
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

HEADS = ["step", "parameters", "MACs", "without data", "with data", "neither data nor one basis", "data, not one basis"]
STEPS = {
    "two sets of weights, residuals of rank 8": "share{blocks=2",
    "two sets of weights, no residuals": "share{blocks=2,rank=0",
    "three sets of weights, residuals of rank 8": "share{blocks=3",
    "0.8 of parameters": "share{params=0.8",
    "0.65 of parameters": "share{params=0.65",
    "dictionaries of 3 matrices": "share{kind=dictionary,blocks=3",
    "dictionaries of 2 matrices": "share{kind=dictionary,blocks=2",
    "dictionaries, 0.8 of parameters": "share{kind=dictionary,params=0.8",
    "central tensors, 0.8 of parameters": "share{kind=central,params=0.8",
    "central tensors, 0.65 of parameters": "share{kind=central,params=0.65",
    "codebooks, up to 0.25 of bytes": "share{kind=codebook,params=0.25",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=[], help="parts of what steps are called")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(options.examples)
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    batches = [(part,) for part in windows.split(32)]
    before, rows = figures(graph), []
    for name, step in STEPS.items():
        if options.only and not any(text in name for text in options.only):
            continue
        judged: list[str] = []
        after = before
        for more in ("",) if "codebook" in step else ("", ",align=false"):
            for data in (None, batches):
                found = regauge.optimize(graph, f"{step}{more}}}", data=data)
                after = after if judged else figures(found)
                judged.append(f"{char_gpt.perplexity(found.to_torch().eval()):.3f}")
        shares = f"{after.parameters / before.parameters:.2f}", f"{after.macs / before.macs:.2f}"
        rows.append([name, *shares, *judged, *[""] * (4 - len(judged))])
        print("  ".join(rows[-1]), flush=True)
    print(environment())
    if options.write:
        append_table(
            "Blocks with weights in common, no fine-tuning", HEADS, rows, f"{options.examples} windows of text."
        )


if __name__ == "__main__":
    main()
