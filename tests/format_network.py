"""A network for tests of formats of weights, and what is lost of it."""

import torch
from torch import nn

import regauge
from regauge.ir.graph import Graph

WIDTH = 40  # no multiple of what a byte holds of trits


def network() -> tuple[Graph, list[tuple[torch.Tensor]]]:
    """Two linear layers and a convolution, on channels of unlike sizes."""
    front = nn.Conv1d(6, WIDTH, 3), nn.ReLU(), nn.Flatten(1)
    model = nn.Sequential(*front, nn.Linear(4 * WIDTH, 256), nn.ReLU(), nn.Linear(256, 128))
    sizes = torch.linspace(0.3, 2.0, 6)[:, None]
    batches = [(torch.randn(128, 6, 6) * sizes,) for _ in range(4)]
    return regauge.capture(model.eval(), batches[0], dynamic={0: {0: "batch"}}), batches


def decibels(graph: Graph, other: Graph) -> float:
    x = torch.randn(64, 6, 6) * torch.linspace(0.3, 2.0, 6)[:, None]
    (a,), (b,) = graph.run((x,)), other.run((x,))
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))


def share(weight: torch.Tensor, values: torch.Tensor) -> float:
    return float((values - weight).square().sum() / weight.square().sum())
