"""Pruning to a latency, measured, beside pruning to multiply-accumulates that give the same latency.

    python benchmarks/prune_latency.py [--write] [--latency 0.6] [--networks resnet mobilenet transformer]

Networks of random weights are cut to a share of their time in onnxruntime and in torch, one thread. Asked and measured
shares are those of the pass and of a second measurement afterwards, in which all versions run in turns. Beside that the
share of MACs is searched for that measures the same latency, and the time is measured of the version that has the asked
share of MACs, as a tool gives it that takes MACs for time. What is kept of the scores (the L2 norms by which both
choose, each by the same knapsack) says which of two versions of equal time is the better one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn

import regauge
from benchmarks.report import append_table, environment
from regauge.backends.latency import measure
from regauge.ir.cost import figures
from regauge.ir.graph import Graph
from regauge.passes.pruning.score_table import score

HEADS = [
    "network", "runtime", "method", "asked", "as measured by the pass", "measured afterwards", "noise", "MACs kept",
    "parameters kept", "scores kept", "seconds",
]  # fmt: skip


class Encoder(nn.Module):
    """A small transformer over tokens that are vectors already."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(192, 6, 768, dropout=0.0, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(192, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.layers(x).mean(1))
        return logits


class Block(nn.Module):
    """Layers beside a shortcut, which is a convolution where sizes change."""

    def __init__(self, layers: nn.Sequential, shortcut: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.layers, self.shortcut, self.last = layers, shortcut, last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.layers(x) + self.shortcut(x))
        return y


def layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    parts = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*parts, *([nn.ReLU()] if act else []))


def headed(layers: list[nn.Module], width: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


def resnet() -> tuple[nn.Module, torch.Tensor]:
    """ResNet-18 of He et al. 2016."""
    layers, width = [layer(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for step in (stride, 1):
            body = nn.Sequential(layer(width, outputs, 3, step), layer(outputs, outputs, 3, act=False))
            changes = width != outputs
            shortcut = layer(width, outputs, 1, step, act=False) if changes else nn.Identity()
            layers.append(Block(body, shortcut, nn.ReLU()))
            width = outputs
    return headed(layers, width), torch.randn(1, 3, 96, 96)


def mobilenet() -> tuple[nn.Module, torch.Tensor]:
    """MobileNet v2 of Sandler et al. 2018."""
    layers: list[nn.Module] = [layer(3, 32, 3, 2)]
    width = 32
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, outputs, repeats, first in table:
        for step in [first] + [1] * (repeats - 1):
            hidden = width * expansion
            expand = [layer(width, hidden, 1)] if expansion > 1 else []
            body = nn.Sequential(*expand, layer(hidden, hidden, 3, step, hidden), layer(hidden, outputs, 1, act=False))
            plain = step > 1 or width != outputs
            layers.append(body if plain else Block(body, nn.Identity(), nn.Identity()))
            width = outputs
    return headed([*layers, layer(width, 1280, 1)], 1280), torch.randn(1, 3, 96, 96)


def transformer() -> tuple[nn.Module, torch.Tensor]:
    return Encoder(), torch.randn(1, 64, 192)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "resnet": resnet,
    "mobilenet": mobilenet,
    "transformer": transformer,
}


def graphs(name: str) -> dict[str, Graph]:
    """The network as captured, and as loaded from ONNX, which decides where its latency is measured."""
    torch.manual_seed(0)
    model, example = NETWORKS[name]()
    graph = regauge.capture(model.eval(), (example,))
    with tempfile.TemporaryDirectory() as folder:
        loaded = regauge.load(graph.to_onnx(Path(folder) / "model.onnx"))
        for parameter in loaded.all_parameters():
            parameter.weight.load()
        return {"torch": graph, "onnxruntime": loaded}


def kept(graph: Graph, small: Graph) -> list[str]:
    """Shares of MACs, of parameters and of all scores that are left."""
    before, after = figures(graph), figures(small)
    groups = [group for group in graph.groups() if group.free]
    scores = score(graph, groups, "l2")
    counts = {cut.dim: cut.after for cut in small.report.passes[0].cuts}
    left = sum(np.sort(scores[g.dim])[::-1][: counts.get(g.name, g.size)].sum() for g in groups)
    total = sum(own.sum() for own in scores.values())
    return [f"{after.macs / before.macs:.2f}", f"{after.parameters / before.parameters:.2f}", f"{left / total:.3f}"]


def by_macs(graph: Graph, share: float) -> tuple[Graph, float]:
    """The version by MACs that takes a share of the time, and its share of MACs: by bisection on the measured time."""
    low, high = 0.1, 1.0
    for _ in range(6):
        macs = (low + high) / 2
        small = regauge.optimize(graph, f"prune{{macs={macs:.4f},scope=knapsack}}")
        original, timing = measure([graph, small])
        if timing.milliseconds > share * original.milliseconds:
            high = macs
        else:
            low, best, found = macs, small, macs
    return best, found


def rows_of(name: str, share: float) -> list[list[str]]:
    rows = []
    for runtime, graph in graphs(name).items():
        start = time.perf_counter()
        ours = regauge.optimize(graph, f"prune{{latency={share},scope=knapsack}}")
        seconds = time.perf_counter() - start
        told = next(note for note in ours.report.passes[0].notes if note.startswith("latency"))
        alike, macs = by_macs(graph, share)
        same = regauge.optimize(graph, f"prune{{macs={share},scope=knapsack}}")
        original, *timings = measure([graph, ours, alike, same])
        measured = [f"{timing.milliseconds / original.milliseconds:.3f}" for timing in timings]
        noise = [f"{(timing.noise**2 + original.noise**2) ** 0.5:.1%}" for timing in timings]
        methods = [
            ("latency", f"{share:.2f}", _shares(told), ours, f"{seconds:.0f}"),
            ("MACs, searched for the same time", f"{macs:.2f} of MACs", "-", alike, "-"),
            ("MACs, the same share", f"{share:.2f} of MACs", "-", same, "-"),
        ]
        for (method, asked, own, small, took), after, error in zip(methods, measured, noise, strict=True):
            rows.append([name, runtime, method, asked, own, after, error, *kept(graph, small), took])
            print("  ".join(rows[-1]), flush=True)
    return rows


def _shares(note: str) -> str:
    """What the pass measured as a share: ``latency: 3.1 ms of 5.2 ms measured in ...``."""
    words = note.split()
    return f"{float(words[1]) / float(words[4]):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.6)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [row for name in options.networks for row in rows_of(name, options.latency)]
    print(environment())
    if options.write:
        note = "Random weights; one thread, medians of runs in turns, as shares of the original's time."
        append_table("Pruning to a latency", HEADS, rows, note)


if __name__ == "__main__":
    main()
