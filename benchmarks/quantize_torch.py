"""Quantized modules in torch beside the float module and torch's own dynamic quantization: decibels, size and speed.

    python benchmarks/quantize_torch.py [--file MODEL.onnx --data INPUTS.npz] [--examples 64] [--nearest] [--write]

char_gpt, and an ONNX file with inputs by name where one is given; half of the examples calibrate, the rest judge.
Decibels are 10 log10(|y|^2 / |y - y'|^2) of the result; size is that of the file of the state_dict, float over
quantized; speed is the float module's time over the quantized one's: medians of processor time in turns, one thread.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn

import regauge
from benchmarks import char_gpt
from benchmarks.report import append_table, environment

HEADS = ["network", "module", "dB", "size", "speed, 1 example", "speed, 8 examples"]
OURS = ("w8a8", "w8a8,activations=dynamic", "w8", "w4")
ROUNDS = 31


def rows(
    name: str, graph: Any, model: nn.Module, batches: list[tuple[torch.Tensor, ...]], method: str
) -> Iterator[list[str]]:
    chosen, held_out = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    modules = {"float": model}
    for scheme in OURS:
        modules[scheme] = regauge.optimize(
            graph, f"quantize{{scheme={scheme},target=torch-cpu{method}}}", data=chosen
        ).to_torch()
    for engine in ("x86", "fbgemm"):
        torch.backends.quantized.engine = engine
        modules[f"torch.ao dynamic, {engine}"] = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
        )
    one = tuple(tensor[:1] for tensor in held_out[0])
    with torch.no_grad():
        times = [in_turns(modules, inputs) for inputs in (one, held_out[0])]
        wanted = torch.cat([model(*batch) for batch in held_out])
        for tool, module in modules.items():
            noise = float((torch.cat([module(*batch) for batch in held_out]) - wanted).square().sum())
            decibels = f"{10 * math.log10(float(wanted.square().sum()) / noise):.1f}" if noise else ""
            size = f"{stored(model) / stored(module):.2f}"
            yield [name, tool, decibels, size, *(f"{found['float'] / found[tool]:.2f}" for found in times)]


def in_turns(modules: Mapping[str, nn.Module], inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Seconds of one run of each."""
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(ROUNDS + 3):
        for name, module in modules.items():
            before = time.thread_time()
            module(*inputs)
            times[name].append(time.thread_time() - before)
    return {name: statistics.median(own[3:]) for name, own in times.items()}


def stored(module: nn.Module) -> int:
    """Bytes of the file of a state_dict, which for torch.ao's modules is no list of tensors."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.tell()


def characters(examples: int, method: str) -> Iterator[list[str]]:
    model, windows = char_gpt.trained(), char_gpt.calibration_windows(examples)
    graph = regauge.capture(model, (windows[:2],), dynamic={0: {0: "batch"}})
    return rows("char_gpt", graph, model, [(part,) for part in windows.split(8)], method)


def file(path: Path, data: Path, examples: int, method: str) -> Iterator[list[str]]:
    graph = regauge.load(path)
    with np.load(data) as arrays:
        whole = [torch.from_numpy(arrays[value.name][:examples]) for value in graph.inputs]
    batches = list(zip(*(tensor.split(8) for tensor in whole), strict=True))
    return rows(path.stem, graph, graph.to_torch().eval(), batches, method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--nearest", action="store_true", help="weights rounded to the nearest: quick")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = []
    method = ",method=nearest" if options.nearest else ""
    parts = [characters(options.examples, method)]
    if options.file:
        parts.append(file(options.file, options.data, options.examples, method))
    for row in itertools.chain(*parts):
        print("  ".join(row), flush=True)
        found.append(row)
    print(environment())
    if options.write:
        append_table(
            "Quantized modules in torch on a CPU", HEADS, found, f"{options.examples} examples, half of them judge."
        )


if __name__ == "__main__":
    main()
