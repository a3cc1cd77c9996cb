"""What sparsity without fine-tuning leaves of a trained character model: perplexity, step by step.

    python benchmarks/sparsify.py [--write] [--windows 128] [--only 2:4]

Calibration windows come from the training text; perplexity is that of the first half of the validation text, which no
step sees. Every linear layer of the blocks is made sparse; the head is tied to the embedding and stays dense.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import regauge
from benchmarks.char_gpt import calibration_windows, perplexity, trained
from benchmarks.report import append_table, environment

STEPS = {
    "2:4, magnitude": "method=magnitude,update=off",
    "2:4, Wanda": "method=wanda,update=off",
    "2:4, Wanda and DSnoT": "method=wanda,refine=means,update=off",
    "2:4, OBS by columns (SparseGPT)": "update=columns,refine=off",
    "2:4, magnitude, least squares": "method=magnitude",
    "2:4, OBS, least squares": "refine=off",
    "2:4, OBS, exchanges, least squares (default)": "",
    "2:4, the same, inputs reordered": "permute=true",
    "2:4 both ways, least squares": "transposable=true",
    "1:4, default": "pattern=1:4",
    "4:8, default": "pattern=4:8",
    "unstructured 50 %, default": "pattern=unstructured",
    "unstructured 70 %, same share of each layer": "pattern=unstructured,ratio=0.7,allocation=uniform",
    "unstructured 70 %, default": "pattern=unstructured,ratio=0.7",
    "blocks 4x4, 50 %, same share of each layer": "pattern=block,allocation=uniform",
    "blocks 4x4, 50 %, default": "pattern=block",
}
HEADS = ["weights", "perplexity", "seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--only", default="", help="steps whose name holds this text")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model, windows = trained(), calibration_windows(options.windows)
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    data = [(part,) for part in windows.split(32)]
    rows = [["dense", f"{perplexity(model):.3f}", ""]]
    print("  ".join(rows[0]), flush=True)
    for name, step in STEPS.items():
        if options.only in name:
            start = time.perf_counter()
            sparse = regauge.optimize(graph, f"sparsify{{{step}}}", data=data)
            seconds = time.perf_counter() - start
            rows.append([name, f"{perplexity(sparse.to_torch().eval()):.3f}", f"{seconds:.0f}"])
            print("  ".join(rows[-1]), flush=True)
    print(environment())
    if options.write:
        note = f"No fine-tuning; {options.windows} calibration windows of 128 characters from the training text."
        append_table("Sparsity without fine-tuning", HEADS, rows, note)


if __name__ == "__main__":
    main()
