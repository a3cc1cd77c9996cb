"""A small network on scikit-learn's digits, and a loop that trains it with or without a sparsifier."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import regauge


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """1,200 training images f32[n,1,8,8] with labels, and 500 others."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images, classes = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    return images[:1200], classes[:1200], images[1200:1700], classes[1200:1700]


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 9, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def captured(model: nn.Module) -> Any:
    return regauge.capture(model, (torch.zeros(2, 1, 8, 8),), dynamic={0: {0: "batch"}})


def train(
    model: nn.Module,
    steps: int,
    sparsifier: Any = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    after: Callable[[], None] | None = None,
) -> torch.optim.Optimizer:
    """So many steps on batches of 64 drawn with the seed; returns the optimizer."""
    images, labels, _, _ = digits()
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (64,), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        if sparsifier is not None:
            loss = loss + sparsifier.loss()
        loss.backward()
        optimizer.step()
        if sparsifier is not None:
            sparsifier.step()
        if after is not None:
            after()
        optimizer.zero_grad()
    model.eval()
    return optimizer


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    _, _, images, labels = digits()
    return float((model.eval()(images).argmax(1) == labels).float().mean())


@torch.no_grad()
def greatest_difference(model: nn.Module, other: nn.Module) -> float:
    """Between logits on the held-out images."""
    images = digits()[2]
    return float((model.eval()(images) - other.eval()(images)).abs().max())
