"""Tensors in files that are mapped into memory: the system drops their pages when it needs the room for others."""

from __future__ import annotations

import os
import sys
import tempfile
import weakref
from contextlib import suppress

import torch

from regauge.ir.weights import CutWeight, DenseWeight, ReorderedWeight, Weight, file_of


def on_disk(weight: Weight) -> bool:
    """Whether the data of a weight is read from a file at each use, or is mapped."""
    if isinstance(weight, CutWeight | ReorderedWeight):
        return on_disk(weight.base)
    return file_of(weight.tensor) is not None if isinstance(weight, DenseWeight) else True


def mapped(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor in a temporary file, which goes with the last tensor that shares its storage.

    It lies in the folder for temporary files (TMPDIR). Tensors on a device and empty ones come back as they are.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.numel():
        return tensor
    data = tensor.detach().reshape(-1)
    with tempfile.NamedTemporaryFile(prefix="regauge-", suffix=".tensor", delete=False) as file:
        data.view(torch.uint8).numpy().tofile(file)  # pages that are written through a mapping would count as memory
    path = file.name
    flat = torch.from_file(path, shared=True, size=data.numel(), dtype=data.dtype)
    if sys.platform == "win32":  # a mapped file cannot be removed there until it is let go
        weakref.finalize(flat.untyped_storage(), _remove, path)
    else:
        os.unlink(path)
    return flat.view(tensor.shape)


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
