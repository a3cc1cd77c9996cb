"""What factorization leaves of trained networks, with and without data, beside plain singular values.

    PYTHONPATH=PHOTOGRAPHS python benchmarks/factorize.py [--only NAME ...] [--examples 128] [--write]

char_gpt    perplexity with its linear layers at 0.8 and 0.6 of their parameters
resnet*     share of photographs in the same class at half of the multiplications; ranks in blocks of 16, too
digits-cnn  the same of the digits' test images
time        onnxruntime's for one batch, of the whole network's; medians in turns, one thread
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import regauge
from benchmarks import char_gpt, digits_networks
from benchmarks.prune_networks import Judge, residual
from benchmarks.report import append_table, environment
from regauge.backends.latency import measure
from regauge.ir.cost import figures
from regauge.passes.calibration.layers import layer_of

HALVES = {"0.5 of MACs": "factorize{macs=0.5}", "0.5 of MACs, blocks of 16": "factorize{macs=0.5,multiple=16}"}
HEADS = ["network", "kept", "parameters", "MACs", "without data", "with data", "time"]


def characters(examples: int) -> Iterator[list[str]]:
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(examples)
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    batches = [(part,) for part in windows.split(32)]
    layers = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
    own = sum(layer.outputs * layer.columns for layer in layers)
    for share in (0.8, 0.6):
        step = f"factorize{{params={round(figures(graph).parameters - (1 - share) * own)}}}"
        yield _row("char_gpt", f"{share} of linear layers", graph, step, batches, _perplexity, (windows[:8],))


def images(depth: int, examples: int) -> Iterator[list[str]]:
    network = residual(depth, examples, 0)

    def judge(found: Any) -> str:
        return f"{network.judge(found.to_torch().eval())[0]:.3f}"

    batches = [(part,) for part in network.batches]
    for kept, step in HALVES.items():
        yield _row(f"resnet{depth}", kept, network.graph, step, batches, judge, (network.batches[0][:8],))


def digits(examples: int) -> Iterator[list[str]]:
    network = digits_networks.trained("digits-cnn")
    graph = regauge.capture(network.model, (network.images[:2],), dynamic={0: {0: "batch"}})
    whole = Judge(network.model, network.test_images)

    def judge(found: Any) -> str:
        return f"{whole(found.to_torch().eval())[0]:.3f}"

    batches = [(part,) for part in network.images[:examples].split(64)]
    for kept, step in HALVES.items():
        yield _row("digits-cnn", kept, graph, step, batches, judge, (network.images[:8],))


def _perplexity(found: Any) -> str:
    return f"{char_gpt.perplexity(found.to_torch().eval()):.3f}"


def _row(
    name: str, kept: str, graph: Any, step: str, batches: Any, judge: Callable[[Any], str], inputs: Any
) -> list[str]:
    alone, found = regauge.optimize(graph, step), regauge.optimize(graph, step, data=batches)
    before, after = figures(graph), figures(found)
    with tempfile.TemporaryDirectory() as folder:
        files = [own.to_onnx(Path(folder) / f"{place}.onnx") for place, own in enumerate((graph, found))]
        whole, small = (timing.milliseconds for timing in measure([regauge.load(file) for file in files], inputs))
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
        "digits-cnn": lambda: digits(options.examples),
    }
    rows = []
    for name, part in parts.items():
        for row in part() if not options.only or name in options.only else ():
            print("  ".join(row), flush=True)
            rows.append(row)
    print(environment())
    if options.write:
        append_table("Layers as products of smaller ones, no fine-tuning", HEADS, rows, f"{options.examples} examples.")


if __name__ == "__main__":
    main()
