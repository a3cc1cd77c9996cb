"""Tensors in temporary files that are read anew at each use: between uses they take no memory.

A mapped tensor (:mod:`regauge.ir.memory.mapped`) stays resident once it was read, until the system wants the room.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch

from regauge.ir.memory.mapped import remove, stored


class SetAside:
    """A tensor in a file of its own in the folder for temporary files (TMPDIR), which goes with this object."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.path = stored(tensor)
        weakref.finalize(self, remove, self.path)

    def load(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        data = torch.from_numpy(np.fromfile(self.path, dtype=np.uint8))
        return data.view(self.dtype).reshape(self.shape)


def loaded(value: Any) -> Any:
    """The tensor of what was set aside; anything else as it is."""
    return value.load() if isinstance(value, SetAside) else value


class Loaded(Sequence[Any]):
    """A sequence whose items are read when they are asked for, and held by nothing but who asked."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return Loaded(self._items[index]) if isinstance(index, slice) else loaded(self._items[index])

    def __iter__(self) -> Iterator[Any]:
        return map(loaded, self._items)


class Environment(dict[Any, Any]):
    """Values by what they belong to; those that were set aside are read when they are asked for."""

    def __getitem__(self, key: Any) -> Any:
        return loaded(super().__getitem__(key))

    def held(self, key: Any) -> Any:
        """A value as it is held."""
        return super().__getitem__(key)
