"""What factorization leaves of trained networks, with and without data, beside plain singular values.

    PYTHONPATH=PHOTOGRAPHS python benchmarks/factorize.py [--only NAME ...] [--examples 128] [--write]

char_gpt    perplexity with its linear layers at 0.8 and 0.6 of their parameters
heads       perplexity with fewer directions in each head of attention (without data, by norms alone), and with parts of
            the parameters, canonicalized before and not
resnet*     share of photographs in the same class at half of the multiplications
time        onnxruntime's for one batch, of the whole network's; medians in turns, one thread
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regauge
from benchmarks import char_gpt
from benchmarks.prune_networks import residual
from benchmarks.report import append_table, environment
from regauge.backends.latency import measure
from regauge.ir.cost import figures
from regauge.passes.calibration.layers import layer_of

HEADS = ["network", "kept", "parameters", "MACs", "without data", "with data", "time"]
OF_HEADS = ["char_gpt", "before", "parameters", "without data", "with data"]


def characters(examples: int) -> Iterator[list[str]]:
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(examples)
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    batches = [(part,) for part in windows.split(32)]
    layers = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
    own = sum(layer.outputs * layer.columns for layer in layers)
    for share in (0.8, 0.6):
        step = f"factorize{{params={round(figures(graph).parameters - (1 - share) * own)}}}"
        yield _row("char_gpt", f"{share} of linear layers", graph, step, batches, _perplexity, (windows[:8],))


def heads(examples: int) -> Iterator[list[str]]:
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(examples)
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    batches = [(part,) for part in windows.split(32)]
    dims = ",".join(f"blocks.{block}.qkv.weight:0.{place}" for block in range(char_gpt.BLOCKS) for place in (1, 5))
    parts = {f"{1 - ratio:g} of heads": f"ratio={ratio},include=[{dims}]" for ratio in (0.25, 0.5, 0.75)}
    parts |= {f"{share} of parameters": f"params={share}" for share in (0.8, 0.6)}
    for name, what in parts.items():
        alone = f"{what},score=l2,compensate=false" if "include" in what else what
        for first in ("", "canonicalize,"):
            found = regauge.optimize(graph, f"{first}prune{{{what}}}", data=batches)
            share = f"{figures(found).parameters / figures(graph).parameters:.2f}"
            without = regauge.optimize(graph, f"{first}prune{{{alone}}}")
            yield [name, first.strip(",") or "as they are", share, _perplexity(without), _perplexity(found)]


def images(depth: int, examples: int) -> Iterator[list[str]]:
    network = residual(depth, examples, 0)

    def judge(found: Any) -> str:
        return f"{network.judge(found.to_torch().eval())[0]:.3f}"

    batches = [(part,) for part in network.batches]
    step = "factorize{macs=0.5}"
    yield _row(f"resnet{depth}", "0.5 of MACs", network.graph, step, batches, judge, (network.batches[0][:8],))


def _perplexity(found: Any) -> str:
    return f"{char_gpt.perplexity(found.to_torch().eval()):.3f}"


def _row(
    name: str, kept: str, graph: Any, step: str, batches: Any, judge: Callable[[Any], str], inputs: Any
) -> list[str]:
    alone, found = regauge.optimize(graph, step), regauge.optimize(graph, step, data=batches)
    before, after = figures(graph), figures(found)
    whole, small = (timing.milliseconds for timing in measure([graph, found], inputs))
    shares = f"{after.parameters / before.parameters:.2f}", f"{after.macs / before.macs:.2f}"
    return [name, kept, *shares, judge(alone), judge(found), f"{small / whole:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of networks")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], Iterator[list[str]]]] = {
        "char_gpt": lambda: characters(options.examples),
        "resnet20": lambda: images(20, options.examples),
        "resnet56": lambda: images(56, options.examples),
    }

    def measured(name: str, part: Callable[[], Iterator[list[str]]]) -> Iterator[list[str]]:
        for row in part() if not options.only or name in options.only else ():
            print("  ".join(row), flush=True)
            yield row

    rows = [row for name, part in parts.items() for row in measured(name, part)]
    of_heads = list(measured("heads", lambda: heads(options.examples)))
    print(environment())
    note = f"{options.examples} examples."
    if options.write and rows:
        append_table("Layers as products of smaller ones, no fine-tuning", HEADS, rows, note)
    if options.write and of_heads:
        append_table("Fewer directions in heads of attention, no fine-tuning", OF_HEADS, of_heads, note)


if __name__ == "__main__":
    main()
