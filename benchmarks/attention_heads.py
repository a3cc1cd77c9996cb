"""What fewer keys and values leave of a trained character model: heads that share them, and layers that do.

    python benchmarks/attention_heads.py [--examples 128] [--write]

convert-gqa    3, 2 and 1 heads of keys and values for 6 of queries, in each of 4 layers
share-kv       3, 2 and 1 layers of 4 that keep keys and values of their own
cache          bytes of keys and values per token in single precision; two numbers where data decides

Perplexity without data, where inputs are made up and nothing is refitted, and with windows of the training text.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regauge
from benchmarks import char_gpt
from benchmarks.report import append_table, environment

HEADS = ["step", "cache", "parameters", "without data", "with data"]
STEPS = [
    *(f"convert-gqa{{kv_heads={n}, method={how}}}" for n in (3, 2, 1) for how in ("mean", "key-driven", "aligned")),
    *(f"share-kv{{layers={n}, method={how}}}" for n in (3, 2, 1) for how in ("cla", "mlkv", "kvsharer", "aligned")),
]


def rows(examples: int) -> Iterator[list[str]]:
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(examples)
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    data = [(part,) for part in windows.split(32)]
    whole = sum(parameter.weight.load().numel() for parameter in graph.parameters.values())
    yield ["whole", "3072", "1.00", f"{char_gpt.perplexity(model):.3f}", ""]
    for step in STEPS:
        alone, found = regauge.optimize(graph, step), regauge.optimize(graph, step, data=data)
        caches = dict.fromkeys(re.findall(r"-> (\d+) bytes", f"{alone.report} {found.report}"))
        left = sum(parameter.weight.load().numel() for parameter in found.parameters.values())
        figures = [f"{char_gpt.perplexity(one.to_torch().eval()):.3f}" for one in (alone, found)]
        yield [step, ", ".join(caches), f"{left / whole:.2f}", *figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    for row in rows(options.examples):
        print("  ".join(row), flush=True)
        found.append(row)
    print(environment())
    if options.write:
        note = f"`python benchmarks/attention_heads.py`: char_gpt, {options.examples} windows of 128 characters."
        append_table("Fewer keys and values, no fine-tuning", HEADS, found, note)


if __name__ == "__main__":
    main()
