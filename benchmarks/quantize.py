"""What quantization leaves of trained networks: size, speed and numbers, beside other quantizers.

    PYTHONPATH=PHOTOGRAPHS python benchmarks/quantize.py [--only NAME ...] [--examples 256] [--write]
    python benchmarks/quantize.py --formats [--only SCHEME ...] [--examples 256] [--write]
    PYTHONPATH=PHOTOGRAPHS python benchmarks/quantize.py --mixed [--only NAME ...] [--examples 256] [--write]
    PYTHONPATH=PHOTOGRAPHS python benchmarks/quantize.py --without-data [--only NAME ...] [--write]
    PYTHONPATH=PEERS python benchmarks/quantize.py --file MODEL.onnx --data INPUTS.npz [--transformer] [--examples 256]

weights   char_gpt (perplexity) and residual networks on photographs (share in the same class), with weights of few
          bits: rounded to the nearest, by columns (GPTQ), and by what `quantize` does
formats   char_gpt with its weights in the other formats: perplexity and bits of a weight, scales and tables included
mixed     the same networks: each layer's bits chosen, within the bytes of the same bits in all layers
without   residual networks, weights rounded without data: as they are, with biases corrected by batch norms, and with
          layers that take over what channels lost: share in the same class, squared error of the logits
file      an ONNX file in 8 bits, beside what other quantizers make of it (quantize_peers.py): decibels of the first
          output, bytes and processor time, the float file in onnxruntime over the quantized model
Decibels are 10 log10(|y|^2 / |y - y'|^2) over held-out inputs; times are medians in turns, one thread.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import regauge
from benchmarks import char_gpt
from benchmarks.prune_networks import residual
from benchmarks.quantize_peers import compare
from benchmarks.report import append_table, environment
from regauge.ir.cost import figures

WEIGHTS = ["network", "bits", "nearest", "columns (GPTQ)", "quantize"]
FORMATS = ["format", "bits a weight", "without data", "on data"]
OTHERS = (
    "e4m3", "e5m2", "fp8", "pow2", "pow2,bits=3", "bfp", "bfp,bits=3", "codebook", "codebook,bits=3", "codebook,bits=2",
    "codebook,bits=2,per=row", "codebook,bits=2,group=32", "codebook,bits=2,group=32,permute=true", "ternary",
    "ternary,per=row", "ternary,per=row,statistic=mean", "ternary,per=row,statistic=median", "ternary,per=tensor",
    "onebit", "bitstack,bytes=0.3", "bitstack,bytes=0.25", "bitstack,bytes=0.2",
)  # fmt: skip
MIXED = ["network", "bits", "group in convolutions", "kB", "same bits", "mixed", "mixed, no data for the choice"]
WITHOUT = ["network", "bits", "nearest", "biases corrected", "udfc", "udfc, biases corrected"]
FILE = ["file", "quantizer", "dB", "size", "speed, 1 example", "speed, 8 examples"]


def weights(examples: int, only: list[str]) -> Iterator[list[str]]:
    """Rows of weights alone, in groups of 32 where these are linear layers and per output in convolutions."""
    for name, graph, batches, judge in _networks(examples, only):
        yield [name, "32", "", "", judge(graph)]
        for bits in (4, 3, 2):
            found = []
            for method in ("nearest", "columns", "descent"):
                step = f"quantize{{scheme=w{bits},target=reference,embeddings=false,method={method}}}"
                found.append(judge(regauge.optimize(graph, step, data=batches)))
            yield [name, str(bits), *found]


def mixed(examples: int, only: list[str]) -> Iterator[list[str]]:
    """Rows of mixed precision at the bytes of uniform bits."""
    for name, graph, batches, judge in _networks(examples, only):
        yield [name, "32", "", f"{figures(graph).bytes / 1e3:.0f}", judge(graph), "", ""]
        for bits, group in itertools.product((4, 3), ("", "36") if name.startswith("resnet") else ("",)):
            options = "target=reference,embeddings=false" + (f",group={group}" if group else "")
            same = regauge.optimize(graph, f"quantize{{scheme=w{bits},{options}}}", data=batches)
            room = figures(same).bytes
            found = [judge(same)]
            for way in ("loss", "zd"):
                step = f"quantize{{scheme=mixed,bytes={room},sensitivity={way},{options}}}"
                found.append(judge(regauge.optimize(graph, step, data=batches)))
            yield [name, str(bits), group, f"{room / 1e3:.0f}", *found]


def without_data(only: list[str]) -> Iterator[list[str]]:
    """Rows of weights alone, one scale for each output: share in the same class / squared error of the logits."""
    ways = ("method=nearest", "correct=true", "method=udfc,correct=false", "method=udfc")
    for depth in (20, 56):
        if only and f"resnet{depth}" not in only:
            continue
        network = residual(depth, 1, 0)
        for bits in (8, 4, 3):
            found = []
            for way in ways:
                step = f"quantize{{scheme=w{bits},target=reference,embeddings=false,{way}}}"
                same, error = network.judge(regauge.optimize(network.graph, step).to_torch().eval())
                found.append(f"{same:.3f} / {error:.4f}")
            yield [f"resnet{depth}", str(bits), *found]


def _networks(examples: int, only: list[str]) -> Iterator[tuple[str, Any, list[Any], Callable[[Any], str]]]:
    networks: dict[str, Callable[[], tuple[Any, list[Any], Callable[[Any], str]]]] = {
        "char_gpt": lambda: _characters(examples),
        "resnet20": lambda: _images(20, examples),
        "resnet56": lambda: _images(56, examples),
    }
    for name, build in networks.items():
        if not only or name in only:
            yield name, *build()


def formats(examples: int, only: list[str]) -> Iterator[list[str]]:
    """Rows of the other formats of weights: rounded to the nearest without data, and as they are on data."""
    graph, batches, judge = _characters(examples)
    yield ["float", "32", "", judge(graph)]
    for scheme in OTHERS:
        if only and scheme.partition(",")[0] not in only:
            continue
        step = f"quantize{{scheme={scheme},target=reference,embeddings=false}}"
        alone = "" if scheme.startswith(("fp8", "bitstack")) else judge(regauge.optimize(graph, step))
        found = regauge.optimize(graph, step, data=batches)
        bits = re.search(r"([\d.]+) bits", " ".join(found.report.passes[0].notes))
        yield [scheme, bits.group(1) if bits else "8", alone, judge(found)]


def _characters(examples: int) -> tuple[Any, list[Any], Callable[[Any], str]]:
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(max(8, examples // 2))
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    batches = [(part,) for part in windows.split(32)]
    return graph, batches, lambda found: f"{char_gpt.perplexity(found.to_torch().eval()):.3f}"


def _images(depth: int, examples: int) -> tuple[Any, list[Any], Callable[[Any], str]]:
    network = residual(depth, examples, 0)
    return (
        network.graph,
        [(part,) for part in network.batches],
        lambda found: f"{network.judge(found.to_torch().eval())[0]:.3f}",
    )


def file(path: Path, data: Path, examples: int, transformer: bool, tools: list[str]) -> Iterator[list[str]]:
    """Rows of an ONNX file in 8 bits, on the first examples of an .npz by input name.

    Half of the examples calibrate, the rest judge; batches of 8.
    """
    with np.load(data) as arrays:
        batches = [
            {name: torch.from_numpy(arrays[name][start : start + 8]) for name in arrays}
            for start in range(0, examples, 8)
        ]
    chosen, held_out = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    one = {name: tensor[:1] for name, tensor in held_out[0].items()}
    for row in compare(path, chosen, held_out, [one, held_out[0]], transformer=transformer, tools=tools):
        yield [path.stem, *row, *[""] * (len(FILE) - 1 - len(row))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of networks")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--formats", action="store_true", help="formats of weights beyond integers")
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--without-data", action="store_true")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--transformer", action="store_true", help="the file is of a transformer: a peer wants to know")
    parser.add_argument("--tools", nargs="*", default=["*"], help="globs on names of quantizers, of a file in 8 bits")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.file:
        title, heads = "Weights and activations of 8 bits in onnxruntime", FILE
        found = file(options.file, options.data, options.examples, options.transformer, options.tools)
    elif options.formats:
        title, heads = "Weights in other formats, no fine-tuning", FORMATS
        found = formats(options.examples, options.only)
    elif options.without_data:
        title, heads = "Weights rounded without data", WITHOUT
        found = without_data(options.only)
    elif options.mixed:
        title, heads = "Mixed precision at the bytes of uniform bits, no fine-tuning", MIXED
        found = mixed(options.examples, options.only)
    else:
        title, heads = "Quantized weights, no fine-tuning", WEIGHTS
        found = weights(options.examples, options.only)
    rows = []
    for row in found:
        print("  ".join(row), flush=True)
        rows.append(row)
    print(environment())
    if options.write:
        append_table(title, heads, rows, f"{options.examples} examples.")


if __name__ == "__main__":
    main()
