"""Grids of numbers that are no integers: floats of 8 bits, and powers of two with a sign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from regauge.ir.graph import Graph
from regauge.passes.quantization.formats import Stored
from regauge.passes.quantization.grid import Grid, positive

_SHRUNK = 0.1  # of a weight's norm: rounding to 3 bits of mantissa changes it by less than a hundredth


@dataclass(frozen=True)
class Float8(Grid):
    """The floats of a type of 8 bits. Scales are powers of two, which leave mantissas as they are: 2^-b, where b is

    floor(log2(greatest float / greatest entry)) - margin      so that nothing is beyond the greatest float (AMAX)
    bias                                                       one number for all, where it is given (CSCALE)

    (Perez et al. 2023, Training and Inference of Large Language Models Using 8-bit Floating Point, section 3).
    """

    bits: int = 8
    kind: torch.dtype = torch.float8_e4m3fn
    margin: int = 0
    bias: int | None = None

    @property
    def low(self) -> int:
        return -self.high

    @property
    def high(self) -> int:
        return int(torch.finfo(self.kind).max)

    @property
    def dtype(self) -> torch.dtype:
        return self.kind

    def span(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = super().span(low, high)
        if self.bias is not None:
            return torch.full_like(scale, 2.0**-self.bias), zero
        return torch.exp2(torch.ceil(torch.log2(scale)) + self.margin), zero

    @property
    def fixed(self) -> bool:
        return self.bias is not None

    @property
    def free_scales(self) -> bool:
        return False

    def codes(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest floats, as numbers in the type of ``x``."""
        return (x / scale).clamp(self.low, self.high).float().to(self.kind).to(x.dtype)


@dataclass(frozen=True)
class Powers(Grid):
    """0 and sign 2^-k, k from 0 to 2^(bits - 1) - 2: products are shifts. Logarithms are rounded, scales are powers of
    two (You et al. 2023, ShiftAddViT, section 4.1, whose weights are sign 2^round(log2 |w|); 0 is added to keep zeros).
    """

    bits: int = 4

    @property
    def low(self) -> int:
        return -1

    @property
    def high(self) -> int:
        return 1

    @property
    def least(self) -> int:
        """The exponent of the smallest number that is not 0."""
        return 2 - (1 << (self.bits - 1))

    @property
    def table(self) -> torch.Tensor:
        powers = torch.exp2(-torch.arange(1.0 - self.least))
        return torch.cat([torch.zeros(1), powers, -powers])

    @property
    def free_scales(self) -> bool:
        return False

    def span(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        greatest = positive(torch.maximum(-low, high))
        return torch.exp2(torch.round(torch.log2(greatest))), torch.zeros_like(greatest)

    def codes(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The numbers of nearest logarithm; 0 where that is less than half of the smallest."""
        size = (x / scale).abs()
        power = torch.exp2(torch.round(torch.log2(size.clamp(min=1e-30))).clamp(self.least, 0))
        return torch.where(size < 2.0 ** (self.least - 1), 0.0, power * torch.sign(x))

    def digits(self, codes: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Places in the table."""
        count = 1 - self.least
        place = 1 - torch.log2(codes.abs().clamp(min=2.0**self.least))
        return torch.where(codes == 0, 0.0, place + count * (codes < 0)), 2 * count + 1


def beyond_exponent(graph: Graph, stored: Mapping[str, Stored]) -> list[str]:
    """A note on weights of the graph that one exponent for all (cscale) saturates, or lets vanish."""
    norms = {
        name: (float(graph.parameters[name].tensor.norm()), float(own.values.norm())) for name, own in stored.items()
    }
    lost = [name for name, (before, after) in norms.items() if abs(after - before) > _SHRUNK * before]
    return [f"beyond the range of one exponent, give another bias: {', '.join(lost)}"] if lost else []
