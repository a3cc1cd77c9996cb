"""Convolutions computed another way: what ``derive`` chooses, and ways that it leaves, in torch and in onnxruntime.

    python benchmarks/convolutions.py [--write]

Medians of the processor time of runs in turns on one thread, of emitted modules and of ONNX files with all of
onnxruntime's optimisations. What is left is measured as it would be: written by hand, and not touched by any pass.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regauge
from benchmarks.report import append_table
from regauge.backends.latency import measure
from regauge.ir.graph import Graph

Case = tuple[str, nn.Module, tuple[int, ...]]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def video_block(width: int) -> nn.Module:
    """A convolution of R(2+1)D (Tran et al. 2018): over height and width, then over time."""
    middle = 3 * 3 * 3 * width * width // (3 * 3 * width + 3 * width)
    return nn.Sequential(
        nn.Conv3d(width, middle, (1, 3, 3), padding=(0, 1, 1)),
        nn.ReLU(),
        nn.Conv3d(middle, width, (3, 1, 1), padding=(1, 0, 0)),
        nn.ReLU(),
    )


def super_resolution(width: int = 64) -> nn.Module:
    """Head and tail of SRResNet (Ledig et al. 2017) around two layers: its last kernel is 9 x 9, of 3 colours."""
    layers = [nn.Conv2d(3, width, 9, padding=4), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 9, padding=4))


def chosen() -> Iterator[Case]:
    yield "3 x 3, 64 -> 3 channels, 56 x 56", nn.Conv2d(64, 3, 3, padding=1), (1, 64, 56, 56)
    yield "3 x 3, 256 -> 4 channels, 28 x 28", nn.Conv2d(256, 4, 3, padding=1), (1, 256, 28, 28)
    yield "3 x 3, 64 -> 1 channel, 56 x 56", nn.Conv2d(64, 1, 3, padding=1), (1, 64, 56, 56)
    yield "9 x 9, 64 -> 3 channels, 56 x 56", nn.Conv2d(64, 3, 9, padding=4), (1, 64, 56, 56)
    yield "7 taps, 512 -> 1 channel, 2000 samples (a vocoder's last)", nn.Conv1d(512, 1, 7, padding=3), (1, 512, 2000)
    yield "(3, 1, 1), 64 channels, 8 x 14 x 14", nn.Conv3d(64, 64, (3, 1, 1), padding=(1, 0, 0)), (1, 64, 8, 14, 14)
    yield "(1, 3, 3), 64 channels, 8 x 14 x 14", nn.Conv3d(64, 64, (1, 3, 3), padding=(0, 1, 1)), (1, 64, 8, 14, 14)
    yield "(3, 3, 3), 32 channels, 8 x 14 x 14", nn.Conv3d(32, 32, 3, padding=1), (1, 32, 8, 14, 14)
    yield "4 x 4 over 4 x 4, 256 channels, 8 examples", nn.Conv2d(256, 256, 4), (8, 256, 4, 4)
    yield "3 x 3 over 1 x 1, 512 channels", nn.Conv2d(512, 512, 3, padding=1), (1, 512, 1, 1)
    yield "3 x 3, dilation 12, 256 channels, 12 x 12", nn.Conv2d(256, 256, 3, 1, 12, 12), (1, 256, 12, 12)
    yield "a layer of R(2+1)D, 64 channels, 8 x 14 x 14", video_block(64), (1, 64, 8, 14, 14)
    yield "SRResNet of 3 layers, 40 x 40", super_resolution(), (1, 3, 40, 40)


def of_torch() -> Iterator[Case]:
    """What pays in torch alone."""
    yield "transposed 4 x 4, stride 2, 256 -> 1", nn.ConvTranspose2d(256, 1, 4, stride=2, padding=1), (1, 256, 32, 32)
    yield "transposed 4 x 4, stride 2, 64 -> 3", nn.ConvTranspose2d(64, 3, 4, stride=2, padding=1), (1, 64, 32, 32)
    yield "transposed 2 x 2, stride 2, 64 -> 32, 64 x 64", nn.ConvTranspose2d(64, 32, 2, stride=2), (1, 64, 64, 64)


def left() -> Iterator[tuple[str, nn.Module, nn.Module, tuple[int, ...]]]:
    """Ways that the costs say do not pay."""
    w = 0.05 * torch.randn(64, 64, 3, 3)
    yield (
        "3 x 3, dilation 2, as a dense one of phases",
        Function(lambda x: F.conv2d(x, w, padding=2, dilation=2)),
        Function(lambda x: _phases(x, w, 2)),
        (1, 64, 32, 32),
    )
    taps = w.permute(2, 3, 0, 1).reshape(-1, 64, 1, 1).contiguous()
    yield (
        "3 x 3, 64 -> 64, as a product and offset adds",
        Function(lambda x: F.conv2d(x, w, padding=1)),
        Function(lambda x: _added(x, taps, 3)),
        (1, 64, 28, 28),
    )
    patch = 0.05 * torch.randn(96, 3, 4, 4)
    yield (
        "patches of 4 x 4, as a linear map",
        Function(lambda x: F.conv2d(x, patch, stride=4)),
        Function(lambda x: _linear_patches(x, patch)),
        (1, 3, 224, 224),
    )
    up = 0.05 * torch.randn(64, 32, 2, 2)
    rows = up.permute(1, 2, 3, 0).reshape(-1, 64, 1, 1).contiguous()
    yield (
        "transposed 2 x 2, stride 2, 64 -> 32, as a product",
        Function(lambda x: F.conv_transpose2d(x, up, stride=2)),
        Function(lambda x: F.pixel_shuffle(F.conv2d(x, rows), 2)),
        (1, 64, 64, 64),
    )


def _phases(x: Tensor, w: Tensor, rate: int) -> Tensor:
    n, c, height, width = x.shape
    x = F.pad(x, (rate,) * 4)
    rows, columns = (height + 2 * rate) // rate, (width + 2 * rate) // rate
    x = x.reshape(n, c, rows, rate, columns, rate).permute(0, 3, 5, 1, 2, 4).reshape(-1, c, rows, columns)
    y = F.conv2d(x, w).reshape(n, rate, rate, len(w), rows - 2, columns - 2)
    return y.permute(0, 3, 4, 1, 5, 2).reshape(n, len(w), height, width)


def _added(x: Tensor, taps: Tensor, size: int) -> Tensor:
    n, _, height, width = x.shape
    y = F.pad(F.conv2d(x, taps), (size // 2,) * 4)
    y = y.reshape(n, size, size, -1, height + size - 1, width + size - 1)
    y = torch.stack([y[:, i, :, :, i : i + height] for i in range(size)]).sum(0)
    return torch.stack([y[:, i, :, :, i : i + width] for i in range(size)]).sum(0)


def _linear_patches(x: Tensor, w: Tensor) -> Tensor:
    (n, c, height, width), size = x.shape, w.shape[-1]
    x = x.reshape(n, c, height // size, size, width // size, size).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return F.linear(x, w.flatten(1)).permute(0, 3, 1, 2)


def graphs_of(module: nn.Module, x: Tensor) -> Iterator[tuple[str, Graph]]:
    """A module as it is captured, and as it is loaded from ONNX."""
    graph = regauge.capture(module.eval(), (x,))
    yield "torch", graph
    with tempfile.TemporaryDirectory() as folder:
        yield "onnxruntime", regauge.load(graph.to_onnx(Path(folder) / "model.onnx"))


def times(before: Graph, after: Graph, x: Tensor) -> list[str]:
    first, second = measure([before, after], [x])
    return [f"{first.milliseconds:.3g} -> {second.milliseconds:.3g}", f"{second.milliseconds / first.milliseconds:.2f}"]


def rows() -> Iterator[list[str]]:
    for library, cases in (("any", chosen()), ("torch", of_torch())):
        for name, module, shape in cases:
            torch.manual_seed(0)
            x, cells, rules = torch.randn(shape), [], []
            for _, graph in graphs_of(module, x):
                done = regauge.optimize(graph, f"derive{{library={library}}}")
                entry = done.report.passes[0]
                rules += [note.partition(" by ")[2].partition(";")[0] for note in entry.notes]
                cells += times(graph, done, x) if entry.changed else ["-", "-"]
            yield [name, "; ".join(dict.fromkeys(rules)) + f" ({library})", *cells]
    for name, module, other, shape in left():
        x, cells = torch.randn(shape), []
        for (_, before), (_, after) in zip(graphs_of(module, x), graphs_of(other, x), strict=True):
            torch.testing.assert_close(module(x), other(x), rtol=1e-3, atol=1e-3)
            cells += times(before, after, x)
        yield [name, "left", *cells]


HEADS = ["convolution", "rules (library)", "torch, ms", "ratio", "onnxruntime, ms", "ratio"]
NOTE = (
    "`derive` on float32 convolutions of random weights, medians of the processor time of runs in turns on one thread; "
    "rows that say `torch` ask for what pays there alone, those that say `left` are ways that its costs refuse, "
    "written by hand. 2 CPU cores, shared while this was measured."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for row in rows():
        found.append(row)
        print(*row, sep=" | ", flush=True)
    if given.write:
        append_table("Convolutions computed another way", HEADS, found, NOTE)


if __name__ == "__main__":
    main()
