"""Tensors in files that are mapped into memory: the system drops their pages when it needs the room for others."""

from __future__ import annotations

import os
import sys
import tempfile
import weakref
from contextlib import suppress
from typing import Any

import torch

from regauge.ir.storage.weights import CutWeight, DenseWeight, ReorderedWeight, Weight, file_of


def on_disk(weight: Weight) -> bool:
    """Whether the data of a weight is read from a file at each use, or is mapped."""
    if isinstance(weight, CutWeight | ReorderedWeight):
        return on_disk(weight.base)
    return file_of(weight.tensor) is not None if isinstance(weight, DenseWeight) else True


def mapped(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor in a temporary file, which goes with the last tensor that shares its storage.

    It lies in the folder for temporary files (TMPDIR). Tensors on a device and empty ones come back as they are.
    """
    if not can_be_stored(tensor):
        return tensor
    path = stored(tensor)
    flat = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    if sys.platform == "win32":  # a mapped file cannot be removed there until it is let go
        weakref.finalize(flat.untyped_storage(), remove, path)
    else:
        os.unlink(path)
    return flat.view(tensor.shape)


def can_be_stored(value: Any) -> bool:
    """Whether a value is a dense tensor on the CPU that holds anything."""
    if not isinstance(value, torch.Tensor):
        return False
    return value.device.type == "cpu" and value.layout == torch.strided and value.numel() > 0


def stored(tensor: torch.Tensor) -> str:
    """The path of a temporary file with a tensor's bytes; pages written through a mapping would count as memory."""
    with tempfile.NamedTemporaryFile(prefix="regauge-", suffix=".tensor", delete=False) as file:
        try:
            tensor.detach().reshape(-1).view(torch.uint8).numpy().tofile(file)
        except BaseException:
            remove(file.name)
            raise
    return file.name


def remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
