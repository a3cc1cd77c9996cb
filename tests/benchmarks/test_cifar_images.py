"""Images of CIFAR-10 as its binary version stores them: a class, then planes of red, green and blue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.cifar_resnet import DEVIATION, MEAN, cifar


def test_pixels_and_classes(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (3, 3073), dtype=np.uint8)
    stored.tofile(tmp_path / "test_batch.bin")
    images, classes = cifar(tmp_path, "test_batch", 2)
    assert classes.tolist() == stored[:2, 0].tolist()
    pixels = (images * DEVIATION + MEAN) * 255
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(pixels.round().to(torch.uint8), torch.from_numpy(stored[:2, 1:]).view(2, 3, 32, 32))


def test_too_few_images_are_named(tmp_path: Path) -> None:
    np.zeros(3073 * 2, np.uint8).tofile(tmp_path / "test_batch.bin")
    with pytest.raises(ValueError, match="holds 2 images, and 3 are asked for"):
        cifar(tmp_path, "test_batch", 3)
