"""Weights: where the data of a parameter is, read only when asked for, never written in place.

A Weight has a shape and a dtype and can be loaded. Cutting one gives a weight that remembers what to keep, so that a
model on disk is pruned by streaming: each tensor is read, sliced, written and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class Weight(Protocol):
    """Anything with a shape and a dtype that can be read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype | str: ...

    def load(self) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A tensor in memory, possibly the user's own: shared, never written."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def load(self) -> torch.Tensor:
        return self.tensor


@dataclass(frozen=True, eq=False)
class LazyWeight:
    """A tensor behind a function, such as a region of a file; nothing is kept after a read.

    It is ``resident`` where what is read lies in memory anyway.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], torch.Tensor]
    resident: bool = False

    def load(self) -> torch.Tensor:
        return self.read()


@dataclass(eq=False)
class KeptWeight:
    """A tensor that is computed when it is first asked for and then kept: for what is made of resident ones."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    compute: Callable[[], torch.Tensor] | None
    _kept: torch.Tensor | None = None

    def load(self) -> torch.Tensor:
        if self._kept is None:
            assert self.compute is not None
            self._kept, self.compute = self.compute(), None  # what it was made of may go
        return self._kept


@dataclass(frozen=True, eq=False)
class CutWeight:
    """Another weight of which some axes keep only some indices (``None`` keeps all)."""

    base: Weight
    keep: tuple[np.ndarray | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size if kept is None else len(kept) for size, kept in zip(self.base.shape, self.keep, strict=True))

    @property
    def dtype(self) -> torch.dtype | str:
        return self.base.dtype

    def load(self) -> torch.Tensor:
        tensor = self.base.load()
        for axis, kept in enumerate(self.keep):
            if kept is not None:
                tensor = tensor.index_select(axis, torch.as_tensor(kept, dtype=torch.long, device=tensor.device))
        return tensor


@dataclass(frozen=True, eq=False)
class ReorderedWeight:
    """Another weight with its entries along an axis in another order, by positions that broadcast along the others."""

    base: Weight
    axis: int
    positions: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype | str:
        return self.base.dtype

    def load(self) -> torch.Tensor:
        return taken_along(self.base.load(), self.positions, self.axis)


def taken_along(tensor: torch.Tensor, positions: np.ndarray, axis: int) -> torch.Tensor:
    """``torch.take_along_dim``, which torch lacks for floats of 8 bits: of these the bytes are taken."""
    plain = tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor
    return torch.take_along_dim(plain, torch.from_numpy(positions).to(tensor.device), axis).view(tensor.dtype)


SAMPLED_BYTES = 256  # of a weight, before all of it is read to see whether it is equal to another


def sampled_bytes(data: np.ndarray) -> bytes:
    """Some of the bytes of a weight, from all over it, which tell most unequal ones apart."""
    step = (len(data) // SAMPLED_BYTES) | 1  # odd, so that it is not one same byte of every number
    return data[::step].tobytes()


def dense(tensor: torch.Tensor) -> DenseWeight:
    return DenseWeight(tensor.detach())


def device_of_weight(weight: Weight) -> torch.device:
    """Where a weight is; what is read or computed when it is asked for is on the CPU."""
    if isinstance(weight, CutWeight | ReorderedWeight):
        return device_of_weight(weight.base)
    return weight.tensor.device if isinstance(weight, DenseWeight) else torch.device("cpu")


def is_resident(weight: Weight) -> bool:
    """Whether the data lies in memory, so that to keep what is computed from it costs no other order of memory."""
    if isinstance(weight, CutWeight | ReorderedWeight):
        return is_resident(weight.base)
    return isinstance(weight, DenseWeight | KeptWeight) or isinstance(weight, LazyWeight) and weight.resident


def writes(weight: Weight) -> int:
    """How often torch wrote into the tensor of a dense weight; 0 for one read from a file at each use."""
    if isinstance(weight, CutWeight | ReorderedWeight):
        return writes(weight.base)
    if not isinstance(weight, DenseWeight) or weight.tensor.is_inference():  # the latter keep no count
        return 0
    return weight.tensor._version


def cut(weight: Weight, keep: Sequence[np.ndarray | None]) -> Weight:
    """``weight`` with only the kept indices; cuts of cuts are composed, so that the data is read once."""
    if all(kept is None for kept in keep):
        return weight
    if isinstance(weight, CutWeight):
        composed = tuple(
            inner if outer is None else (outer if inner is None else inner[outer])
            for inner, outer in zip(weight.keep, keep, strict=True)
        )
        return CutWeight(weight.base, composed)
    return _made_now_in_memory(CutWeight(weight, tuple(keep)))


def reordered(weight: Weight, axis: int, positions: np.ndarray) -> Weight:
    """``weight`` with its entries along an axis in another order; see :class:`ReorderedWeight`."""
    return _made_now_in_memory(ReorderedWeight(weight, axis, positions))


def _made_now_in_memory(made: CutWeight | ReorderedWeight) -> Weight:
    """In memory a slice is made now and the original may go; a file stays where it is until the slice is written."""
    in_memory = isinstance(made.base, DenseWeight) and file_of(made.base.tensor) is None
    return dense(made.load()) if in_memory else made


def file_of(tensor: torch.Tensor) -> str | None:
    """The file in which a tensor lies that torch has mapped into memory (``torch.from_file``), else None."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return None
    try:
        return tensor.untyped_storage().filename
    except (AttributeError, NotImplementedError, RuntimeError):  # subclasses without a storage of their own
        return None
