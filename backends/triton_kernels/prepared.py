"""Launches that are made ready: what follows from shapes, strides and the device is found once, and not each time.

A kernel of a small tensor takes a GPU a few microseconds; to find the sizes of loops, steps and tiles anew takes Python
a hundred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from regauge.backends.triton_kernels.loops import Tensor
from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.products import FLOAT8
from regauge.ir.graph import Value

Key: TypeAlias = tuple[Any, ...]

MOST_PREPARED = 1024
"""Launches that a kernel remembers; of lengths that grow with each call it forgets all, and begins anew."""


@dataclass(frozen=True)
class Call:
    """A kernel as Triton has it, on how many programs, and its constants and options."""

    function: Any
    grid: tuple[int, ...]
    told: Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A launch for tensors of these shapes and strides on a device.

    ``reads`` and ``writes`` are in the order of the arguments; behind them come the parts of ``totals`` and ``scratch``
    (float32, of these shapes), then ``numbers``. ``calls`` take the same arguments, one after the other; ``sizes`` are
    those of the loops.
    """

    sizes: Mapping[Dim, int]
    device: torch.device
    reads: tuple[Value, ...]
    writes: tuple[tuple[Value, list[int]], ...]
    totals: tuple[tuple[Tensor, list[int], list[int]], ...]  # with the shape of its parts, and of what they add up to
    scratch: tuple[int, ...]
    numbers: Sequence[int]
    calls: tuple[Call, ...]

    def run(self, given: Mapping[Value, torch.Tensor]) -> dict[Value, torch.Tensor]:
        """The results, in new memory, for the tensors that are read."""
        device = self.device
        results = {value: torch.empty(shape, dtype=value.dtype, device=device) for value, shape in self.writes}  # type: ignore[arg-type]
        parts = [torch.empty(shape, dtype=torch.float32, device=device) for _, shape, _ in self.totals]
        if self.calls:
            scratch = [torch.empty(size, dtype=torch.float32, device=device) for size in self.scratch]
            read = [given[value] for value in self.reads]
            arguments = [*map(_as_stored, (*read, *results.values())), *parts, *scratch, *self.numbers]
            # Triton launches on the current GPU, wherever its arguments lie.
            with torch.cuda.device_of(read[0]):  # type: ignore[no-untyped-call]
                for call in self.calls:
                    call.function[call.grid](*arguments, **call.told)
        for (tensor, _, shape), part in zip(self.totals, parts, strict=True):
            results[tensor.value] = part.sum(0).to(tensor.value.dtype).reshape(shape)
        return results


def key_of(tensors: Sequence[torch.Tensor]) -> Key:
    """What a launch follows from."""
    return (tensors[0].device, *((tensor.shape, tensor.stride()) for tensor in tensors))


def _as_stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype in FLOAT8 else tensor
