"""One network, three ONNX exports: dynamo, dynamo unoptimised, TorchScript. They must give the same groups.

    python benchmarks/onnx_same_groups.py [MODEL ...] [--ratio 0.5] [--write]

For each export: nodes in the file, free Dims, numbers in the kernels and matrices (exporters fold BatchNorms, biases
and position tables away or leave them, but never a kernel), how many of them ``prune{ratio=...}`` leaves, the largest
difference between the loaded graph and onnxruntime, relative to the largest output. ``same`` says whether all three
have free Dims of the same sizes, before and after pruning. Where they differ it is said which Dims do and what pins
them, or what the exporter folded away; exits with 1 where that happens. Exports are kept in a folder of the system's
temporary one, so that a second run is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn

import regauge
from benchmarks.model_case import redraw
from benchmarks.report import append_table, environment
from benchmarks.zoo import build as build_case

MODELS = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "bert", "gpt2", "llama", "lstm")
EXPORTS = ("dynamo", "raw", "torchscript")
HEADS = ("model", "export", "nodes", "free Dims", "kernel numbers", "left", "error", "same")
TOLERANCE = 1e-5


class Positional(nn.Module):
    """A transformers model whose inputs go by position and that gives its logits: what all exporters take."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Any) -> Any:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.rnn = nn.LSTM(24, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, tokens: Any) -> Any:
        return self.head(self.rnn(self.embed(tokens))[0])


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    if name == "lstm":
        return Lstm().eval(), (torch.randint(0, 50, (2, 7)),)
    if name in ("bert", "gpt2", "llama"):
        case = build_case(f"hf:{name}")
        redraw(case.model)
        return Positional(case.model, list(case.kwargs)).eval(), tuple(case.kwargs.values())
    build_case("hf:bert")  # puts the model list on the path, which makes torchvision importable without its binaries
    import torchvision

    model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    redraw(model)
    return model.eval(), (torch.randn(2, 3, 64, 64),)


def export(model: nn.Module, inputs: tuple[Any, ...], how: str, path: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "torchscript":
            torch.onnx.export(model, inputs, path, dynamo=False, opset_version=17)
        else:
            torch.onnx.export(model, inputs, path, dynamo=True, optimize=how == "dynamo", external_data=False)


@dataclass
class Row:
    name: str
    export: str
    nodes: int
    free: list[int]
    pinned: dict[int, list[str]]  # size -> why Dims of that size are pinned
    after: list[int]  # sizes of free Dims after pruning
    numbers: int
    left: int
    error: float


def kernel_numbers(graph: Any) -> int:
    """Numbers in tensors of two axes and more; axes of size 1 do not count (ONNX gives LSTM biases one)."""
    kernels = [p for p in graph.all_parameters() if p.kind == "parameter" and sum(s > 1 for s in p.shape) > 1]
    return sum(math.prod(p.shape) for p in kernels)


def free_sizes(graph: Any) -> list[int]:
    return sorted((group.size for group in graph.groups() if group.free), reverse=True)


def measure(name: str, how: str, path: Path, inputs: tuple[Any, ...], ratio: float) -> Row:
    graph = regauge.load(path)
    groups = graph.groups()
    pinned: dict[int, list[str]] = {}
    for group in groups:
        if not group.free and group.pins:
            pinned.setdefault(group.size, []).append(f"{group.name}: {group.pins[0]}")
    small = regauge.optimize(graph, f"prune{{ratio={ratio},compensate=false}}")
    nodes = len(graph.metadata["onnx"].graph)
    error = difference(graph, path, inputs)
    free, after = free_sizes(graph), free_sizes(small)
    return Row(name, how, nodes, free, pinned, after, kernel_numbers(graph), kernel_numbers(small), error)


def difference(graph: Any, path: Path, inputs: tuple[Any, ...]) -> float:
    import onnxruntime

    from regauge.ir.running.interpret import run

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (expected,) = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=False)})
    (actual,) = run(graph, list(inputs[: len(names)]))
    return float(np.abs(actual.numpy() - expected).max() / max(np.abs(expected).max(), 1e-30))


def measured(name: str, ratio: float, folder: Path) -> Iterator[Row]:
    model, inputs = build(name)
    for how in EXPORTS:
        path = folder / f"{name}_{how}.onnx"
        if not path.exists():
            export(model, inputs, how, path)
        yield measure(name, how, path, inputs, ratio)


def differences(rows: list[Row]) -> list[str]:
    """For each Dim that one export has free and another has not: why, in words."""
    found = []
    for row in rows[1:]:
        for one, other in ((rows[0], row), (row, rows[0])):
            for size, count in (Counter(one.free) - Counter(other.free)).items():
                reason = other.pinned.get(size, ["the exporter folded it away"])[0]
                found.append(f"{row.name}: {count} free Dims of {size} only in {one.export}; {other.export}: {reason}")
        if row.free == rows[0].free and row.after != rows[0].after:
            found.append(f"{row.name}: {rows[0].export} is pruned to {rows[0].after}, {row.export} to {row.after}")
    return found


def folded(rows: list[Row]) -> list[str]:
    """Where exports hold different numbers although their Dims are the same: in tables, or tied weights held twice."""
    most = max(row.numbers for row in rows)
    return [
        f"{row.name}: {row.export} has {most - row.numbers} numbers fewer (folded tables, or tied weights held once)"
        for row in rows
        if row.numbers < most
    ]


def cells(row: Row, same: bool) -> list[str]:
    left = f"{row.left} ({row.left / row.numbers:.3f})"
    verdict = "yes" if same else "no"
    counts = [str(row.nodes), str(len(row.free)), str(row.numbers), left]
    return [row.name, row.export, *counts, f"{row.error:.0e}", verdict]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / f"regauge-exports-torch-{torch.__version__.partition('+')[0]}"
    folder.mkdir(exist_ok=True)
    logging.disable(logging.WARNING)  # exporters report every constant they could not fold
    print(environment())
    print(" | ".join(HEADS))
    table, notes, wrong = [], [], 0
    for name in options.models:
        rows = list(measured(name, options.ratio, folder))
        found = differences(rows)
        notes += found + folded(rows)
        wrong += bool(found) or any(not row.error < TOLERANCE for row in rows)
        for row in rows:
            table.append(cells(row, not found))
            print(" | ".join(table[-1]), flush=True)
        for note in found + folded(rows):
            print(f"  {note}")
    if options.write:
        append_table("One network, three ONNX exports", HEADS, table, "; ".join(notes))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
