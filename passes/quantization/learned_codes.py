"""The weight of a layer as a function of what is learned, and the codes at which that arrives.

adaround    w ~ s (clip(floor(w / s) + h(V) + z) - z), h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1): whether each weight is
            rounded up or down. Beside the error, lambda sum (1 - |2 h - 1|^b) drives h to 0 or 1 (Nagel et al. 2020, Up
            or Down? Adaptive Rounding for Post-Training Quantization, section 3.2)
flexround   w ~ s1 (clip(round(w / (s1 S2 s3 s4)) + z) - z): a divisor for each weight (S2), row (s3), and input channel
            of a convolution (s4), and the scale s1 itself; all positive, rounding passed straight through (Lee et al.
            2023, FlexRound: Learnable Rounding Based on Element-Wise Division)

Beyond the papers a bias is learned, too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Literal, TypeAlias

import torch

from regauge.passes.calibration.layers import Layer
from regauge.passes.quantization.grid import Coded

Learned: TypeAlias = Literal["adaround", "flexround"]


class LearnedCodes(ABC):
    """A layer whose weight is a function of what is learned; ``weight`` is what is rounded, in steps of the scale."""

    def __init__(self, layer: Layer, start: Coded) -> None:
        self.layer, self.start = layer, start
        self.scale, self.zero = start.spread(start.scale).float(), start.spread(start.zero).float()
        self.weight = layer.matrices(layer.weight.tensor.detach()).flatten(0, 1).float() / self.scale
        self.shift = torch.zeros(
            len(self.weight), requires_grad=layer.bias is not None
        )  # of the bias, in steps of codes
        self.step = start.scale.mean(1).float() * math.sqrt(self.weight.shape[1])

    @property
    @abstractmethod
    def learns(self) -> list[torch.Tensor]: ...

    @abstractmethod
    def values(self) -> torch.Tensor:
        """[rows, columns], as gradients reach what is learned."""

    @abstractmethod
    def coded(self) -> Coded:
        """The codes at which it has arrived."""

    def penalty(self, sharpness: float) -> torch.Tensor | None:
        """What drives it to whole codes."""
        return None

    def bias(self) -> dict[str, torch.Tensor]:
        bias = self.layer.bias
        return (
            {} if bias is None else {bias.name: bias.tensor.detach() + (self.shift * self.step).to(bias.tensor.dtype)}
        )

    def data(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the layer's parameters are with such values."""
        layer = self.layer
        matrices = values.reshape(layer.blocks, layer.outputs, layer.columns)
        return {layer.weight.name: layer.from_matrices(matrices), **self.bias()}

    def _clipped(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes + self.zero).clamp(self.start.grid.low, self.start.grid.high)


class UpOrDown(LearnedCodes):
    def __init__(self, layer: Layer, start: Coded) -> None:
        super().__init__(layer, start)
        self.floor = self.weight.floor()
        share = ((self.weight - self.floor).clamp(1e-4, 1 - 1e-4) + 0.1) / 1.2
        self.v = torch.logit(share).requires_grad_()

    @property
    def learns(self) -> list[torch.Tensor]:
        return [self.v]

    def _up(self) -> torch.Tensor:
        return (self.v.sigmoid() * 1.2 - 0.1).clamp(0, 1)

    def values(self) -> torch.Tensor:
        return (self._clipped(self.floor + self._up()) - self.zero) * self.scale

    def coded(self) -> Coded:
        return self.start.with_codes(self._clipped(self.floor + (self._up() > 0.5)).detach().double())

    def penalty(self, sharpness: float) -> torch.Tensor:
        return (1 - (2 * self._up() - 1).abs().pow(sharpness)).mean()


class Divided(LearnedCodes):
    def __init__(self, layer: Layer, start: Coded) -> None:
        super().__init__(layer, start)
        rows, columns = self.weight.shape
        self.s1 = start.scale.float().log().requires_grad_()
        self.s2 = torch.zeros(rows, columns, requires_grad=True)
        self.s3 = torch.zeros(rows, 1, requires_grad=True)
        self.s4 = torch.zeros(1, columns // layer.taps, requires_grad=layer.taps > 1)

    @property
    def learns(self) -> list[torch.Tensor]:
        return [self.s1, self.s2, self.s3, *([self.s4] if self.s4.requires_grad else [])]

    def _codes(self) -> torch.Tensor:
        divisor = (
            self.start.spread(self.s1)
            - self.scale.log()
            + self.s2
            + self.s3
            + self.s4.repeat_interleave(self.layer.taps, 1)
        )
        scaled = self.weight * (-divisor).exp()
        return self._clipped(scaled + (scaled.round() - scaled).detach())

    def values(self) -> torch.Tensor:
        return (self._codes() - self.zero) * self.start.spread(self.s1.exp())

    def coded(self) -> Coded:
        codes = self._codes().detach().round().double()
        return replace(self.start, codes=codes, scale=self.s1.detach().exp().double())
