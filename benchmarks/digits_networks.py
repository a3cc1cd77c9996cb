"""Networks on scikit-learn's digits, enlarged to 32 x 32: a residual one of nine convolutions, and a transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.train_sparse import Block
from regauge.demo import load_digits

BATCH, SIDE = 64, 32
SHIFT = 3  # pixels by which images of a batch are moved in training, at most


class Twice(nn.Module):
    """Two convolutions with norms beside a shortcut, which has one of its own where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.two, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        beside = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.beside = nn.Sequential(*(beside if stride > 1 else []))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm2(self.two(self.norm1(self.one(x)).relu()))
        return (found + self.beside(x)).relu()


def convolutional() -> nn.Module:
    """Widths 32, 64 and 128: nine convolutions, 305 thousand parameters."""
    stem = [nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    blocks = [Twice(32, 32, 1), Twice(32, 64, 2), Twice(64, 128, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Transformer(nn.Module):
    """64 patches of 4 x 4 pixels, three blocks of width 128 with 4 heads, the mean over tokens."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.places = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        found: torch.Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return found


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "digits-cnn": (convolutional, 400, 3e-3),
    "digits-vit": (Transformer, 1000, 2e-3),
}
"""How a network is made, its steps of training, and their greatest rate."""


@dataclass(frozen=True)
class Trained:
    """A network in inference mode; images f32[n,1,32,32], labels i64[n]."""

    model: nn.Module
    images: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def accuracy(self, logits: torch.Tensor) -> str:
        """Share of test images that are right."""
        return f"{float((logits.argmax(1) == self.test_labels).float().mean()):.3f}"


def trained(name: str, kept: Path | None = None) -> Trained:
    """A network of ``NETWORKS``, trained for a minute or two, or read from the folder ``kept`` if it was before."""
    digits = load_digits()
    build, steps, rate = NETWORKS[name]
    torch.manual_seed(0)
    model, images = build(), _enlarged(digits.images)
    file = None if kept is None else kept / f"{name}.pt"
    if file is not None and file.exists():
        model.load_state_dict(torch.load(file))
    else:
        _train(model, images, digits.labels, steps, rate)
        if file is not None:
            torch.save(model.state_dict(), file)
    return Trained(model.eval(), images, _enlarged(digits.test_images), digits.test_labels)


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    return F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)


def _train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,))
        shifts = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
        F.cross_entropy(model(images[batch].roll(shifts, (2, 3))), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
