"""The residual networks of He et al. 2016 for 32x32 images, with trained weights, and natural images to run them on.

The images are random crops of the two photographs that scikit-learn carries: calibration crops come from their left
halves, held-out ones from the right halves. Defaults of ``prune`` without data were chosen on such held-out crops, so
fresh crops come from other photographs, those that scikit-image carries, on which nothing was decided.

Where the data set that the networks were trained on is at hand, :func:`cifar` reads it (its binary version, as
Krizhevsky 2009 distributes it; it has no licence, so it is not carried along). Crops of photographs look unlike its
objects: most hold none of the ten classes, and the class of such a crop changes more readily.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

WEIGHTS = Path(__file__).resolve().parent.parent.parent / "shared" / "corpus" / "weights"
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
DEVIATION = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
FRESH = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
FIRST_FRESH_SEED = 1000  # far from the seeds that were measured before


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

    photographs = load_sample_images().images
    middles = [photograph.shape[1] // 2 for photograph in photographs]
    halves = [p[:, m:] if held_out else p[:, :m] for p, m in zip(photographs, middles, strict=True)]
    return _drawn(halves, count, seed + held_out)


def cifar(folder: Path, part: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of a part ("data_batch_1", "test_batch"), normalised, [count, 3, 32, 32], and their classes."""
    record = 1 + 3 * 32 * 32
    with (folder / f"{part}.bin").open("rb") as file:
        read = bytearray(file.read(count * record))
    if len(read) != count * record:
        raise ValueError(f"{folder / part}.bin holds {len(read) // record} images, and {count} are asked for")
    rows = torch.frombuffer(read, dtype=torch.uint8).view(count, record)
    return (rows[:, 1:].view(-1, 3, 32, 32).float() / 255 - MEAN) / DEVIATION, rows[:, 0].long()


def has_fresh_photographs() -> bool:
    """Whether scikit-image can be found; it need not be importable."""
    return find_spec("skimage") is not None


def fresh_crops(count: int, *, seed: int = 0) -> torch.Tensor:
    """Like :func:`crops`, from photographs of scikit-image; without it from right halves, by draws of their own."""
    if not has_fresh_photographs():
        return crops(count, held_out=True, seed=FIRST_FRESH_SEED + seed)
    from PIL import Image

    found = find_spec("skimage")
    assert found is not None and found.submodule_search_locations
    folder = Path(next(iter(found.submodule_search_locations))) / "data"
    return _drawn([np.asarray(Image.open(folder / name).convert("RGB")) for name in FRESH], count, seed)


def varied(images: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """Normalised images with colours exchanged, some mirrored, turned or negative, at other light and contrast."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(len(images), 1, 1, 1, generator=generator)

    colours = torch.stack([torch.randperm(3, generator=generator) for _ in images])[:, :, None, None]
    x = torch.gather(images * DEVIATION + MEAN, 1, colours.expand_as(images))
    x = torch.where(uniform() < 0.5, x.flip(3), x)
    x = torch.where(uniform() < 0.25, 1 - x, x)
    x = (x - 0.5) * (0.6 + 0.9 * uniform()) + 0.5 + 0.3 * (uniform() - 0.5)
    x = x.clamp(0, 1) ** (2 ** (2 * uniform() - 1))
    return (torch.where(uniform() < 0.3, x.transpose(2, 3), x) - MEAN) / DEVIATION


def _drawn(photographs: Sequence[np.ndarray], count: int, seed: int) -> torch.Tensor:
    draws = np.random.default_rng(seed)
    found = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        size = int(draws.choice([32, 48, 64, 96, 160]))
        top, left = draws.integers(photograph.shape[0] - size), draws.integers(photograph.shape[1] - size)
        crop = torch.from_numpy(photograph[top : top + size, left : left + size].copy())
        found.append(F.interpolate(crop.permute(2, 0, 1)[None].float() / 255, (32, 32), mode="area"))
    return (torch.cat(found) - MEAN) / DEVIATION
