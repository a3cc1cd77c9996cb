"""The residual networks of He et al. 2016 for 32x32 images, with trained weights, and natural images to run them on.

The images are random crops of the two photographs that scikit-learn carries: calibration crops come from their left
halves, held-out ones from the right halves.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

WEIGHTS = Path(__file__).resolve().parent.parent.parent / "shared" / "corpus" / "weights"
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
DEVIATION = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)


class Block(nn.Module):
    """Two convolutions beside a shortcut without weights, which skips pixels and is padded with zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.extra = (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(x + y)


class ResNet(nn.Module):
    """``depth`` is 6n + 2: n blocks of 16, 32 and 64 channels each."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, depth // 6)
        self.layer2 = self._stage(16, 32, 2, depth // 6)
        self.layer3 = self._stage(32, 64, 2, depth // 6)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(Block(inputs, outputs, stride), *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def trained(depth: int) -> ResNet:
    """The network with its trained weights, in evaluation mode; raises FileNotFoundError where they are absent."""
    from safetensors.torch import load_file

    model = ResNet(depth).eval()
    model.load_state_dict(load_file(WEIGHTS / f"resnet{depth}_cifar10.safetensors"), strict=False)
    return model


def crops(count: int, *, held_out: bool, seed: int = 0) -> torch.Tensor:
    """Normalised crops [count, 3, 32, 32] at several scales, from the left or the right halves of two photographs."""
    from sklearn.datasets import load_sample_images

    draws = np.random.default_rng(seed + held_out)
    found = []
    photographs = load_sample_images().images
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        middle = photograph.shape[1] // 2
        half = photograph[:, middle:] if held_out else photograph[:, :middle]
        size = int(draws.choice([32, 48, 64, 96, 160]))
        top, left = draws.integers(half.shape[0] - size), draws.integers(half.shape[1] - size)
        crop = torch.from_numpy(half[top : top + size, left : left + size].copy()).permute(2, 0, 1)[None].float() / 255
        found.append(F.interpolate(crop, (32, 32), mode="area"))
    return (torch.cat(found) - MEAN) / DEVIATION
