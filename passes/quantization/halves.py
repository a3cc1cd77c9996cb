"""Weights in half precision, made floats when a file is loaded: where 8 bits with their scales save little."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from regauge.ir.graph import Value
from regauge.passes.calibration.quadratic import Quadratic
from regauge.passes.quantization.formats import Constants, Method, Stored

_MOST = 1.25
"""Bytes in half precision, as a multiple of those in 8 bits, up to which it is taken: rows of 5 entries beside a scale
of theirs, the kernels of one channel, have 1.1 times as many, and a 16th of the error."""


@dataclass(frozen=True)
class Half:
    """Every entry a float of 16 bits."""

    def rounded(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> InHalf:
        return InHalf(weight.half())

    def fitted(self, problem: Quadratic, method: Method | None) -> InHalf:
        return InHalf(problem.optimum.half())


@dataclass
class InHalf(Stored):
    """``data`` [rows, columns], of 16 bits."""

    data: torch.Tensor

    @property
    def values(self) -> torch.Tensor:
        return self.data.double()

    @property
    def bits(self) -> float:
        return 16.0 * self.data.numel()

    def write(self, to: Constants) -> Value:
        return to.half("half", self.data)

    def laid_out(self, to: Constants, shape: tuple[int, ...], axis: int) -> Value:
        """The weight in the shape in which a layer has it, whose ``axis`` has the rows."""
        inner = [size for at, size in enumerate(shape) if at != axis]
        return to.half("half", self.data.reshape(shape[axis], *inner).movedim(0, axis).contiguous())


def takes_little_more(entries: int, group: int) -> bool:
    """Whether half precision takes hardly more than 8 bits and a scale for each ``group`` of entries."""
    return 2 * entries <= _MOST * (entries + 4 * entries / group)


def holds(weight: torch.Tensor) -> bool:
    """Whether no entry is beyond half precision, or so small that it loses digits: a part in 1,000 of the entry, or in
    a million of the greatest."""
    return bool(((weight.half().float() - weight).abs() <= weight.abs() / 1e3 + weight.abs().max() / 1e6).all())
