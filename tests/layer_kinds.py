"""Layers of every kind that can be factorized, each in a graph of its own, and metrics of correlated numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer, layer_of


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def metric(size: int, seed: int = 0) -> torch.Tensor:
    """Of strongly correlated numbers."""
    rows = drawn(4 * size, size, seed=seed) @ (drawn(size, size, seed=seed + 1) * torch.logspace(0, -2, size).double())
    return rows.t() @ rows + 1e-6 * torch.eye(size, dtype=torch.float64)


class Matmul(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Stack(nn.Module):
    """A matrix for each of three entries."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 9), (4, 5, 6)),
    "wide": (lambda: nn.Linear(12, 18), (5, 12)),
    "matmul": (Matmul, (2, 3, 12)),
    "stack": (Stack, (3, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2), (2, 4, 17)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 2, padding=1), (1, 3, 4, 5, 3)),
    "pointwise": (lambda: nn.Conv2d(5, 7, 1, stride=2), (2, 5, 6, 6)),
    "conv_transpose": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), (2, 6, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(5, 5, (3, 5), padding=(1, 2), groups=5), (2, 5, 7, 6)),
    "grouped transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 4)),
}


def layer_in(graph: Graph) -> Layer:
    (layer,) = [layer for node in graph.nodes if (layer := layer_of(node, blocks=True)) is not None]
    return layer
