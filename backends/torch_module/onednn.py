"""Layers on kernels of oneDNN, as emitted modules have them: their source is copied from here, without annotations.

Linear and convolutional layers whose weight is laid out for oneDNN once, with the activation behind them in the same
kernel. These kernels run on a CPU in float32 where no gradient is asked for (under ``torch.no_grad()``) and the work is
worth the call; elsewhere, where torch has no such operators, and in torch.compile and torch.export, a layer is the one
of torch that it derives from. Which work is worth it was measured (docs/benchmarks.md).

Two things differ from torch: relu and hardsigmoid of oneDNN make a number of NaN, and what changes a weight through
``.data``, which torch does not count, is not seen until the weight is exchanged (:func:`packed_weight`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def activate(y: torch.Tensor, name: str | None) -> torch.Tensor:
    """What an activation makes of a tensor; None is no activation."""
    if name is None:
        return y
    if name == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    function = getattr(torch if name in ("sigmoid", "tanh") else F, name)
    return function(y)  # type: ignore[no-any-return]


def pointwise(name: str | None) -> tuple[str, list[float], str]:
    """How oneDNN calls an activation: its name, its numbers and its form."""
    names = {None: "none", "silu": "swish", "gelu_tanh": "gelu"}
    return names.get(name, str(name)), [], {"gelu": "none", "gelu_tanh": "tanh"}.get(str(name), "")


def runs_packed(layer: Any, x: torch.Tensor, operator: str) -> bool:
    """Whether a kernel of oneDNN, which has no gradient, can take the place of torch's."""
    weight, bias = layer.weight, layer.bias
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or type(x) is not torch.Tensor:
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.is_inference():
        return False
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return False
    available = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, operator)
    return available and not torch.is_autocast_enabled("cpu")


def packed_weight(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The weight as oneDNN lays it out for such inputs, made anew when it was exchanged or changed in place."""
    weight, known = layer.weight, layer.packed
    if known is None or known[0].data_ptr() != weight.data_ptr() or known[1] != weight._version:
        known = layer.packed = (weight.detach(), weight._version, layer.pack(x))
    return known[2]  # type: ignore[no-any-return]


class PackedLinear(nn.Linear):
    """y = activation(x W^T + b), with W in the layout of oneDNN."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True, activation: str | None = None) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.activation = activation
        self.packed: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())  # type: ignore[no-any-return]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // max(self.in_features, 1)
        if rows < 8 or rows * self.weight.numel() < 1 << 21 or not runs_packed(self, x, "_linear_pointwise"):
            return activate(super().forward(x), self.activation)
        kernel = torch.ops.mkldnn._linear_pointwise
        return kernel(x, packed_weight(self, x), self.bias, *pointwise(self.activation))  # type: ignore[no-any-return]


class PackedConv2d(nn.Conv2d):
    """y = activation(conv(x, W) + b), with W in the layout of oneDNN and y in that of channels last."""

    def __init__(self, *sizes: Any, activation: str | None = None, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.activation = activation
        self.packed: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"  # type: ignore[no-untyped-call]

    def geometry(self) -> tuple[Any, ...]:
        return self.padding, self.stride, self.dilation, self.groups

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(  # type: ignore[no-any-return]
            self.weight.detach(), *self.geometry(), x.shape
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.numel() // max(self.in_channels, 1)  # a 1x1 kernel is a product, which torch's kernels do as well
        small = self.kernel_size == (1, 1) and pixels * self.weight.numel() < 1 << 21
        if x.dim() != 4 or not runs_packed(self, x, "_convolution_pointwise"):
            return activate(super().forward(x), self.activation)
        x = x.contiguous(memory_format=torch.channels_last)
        if small:
            return activate(super().forward(x), self.activation)
        kernel = torch.ops.mkldnn._convolution_pointwise
        weight = packed_weight(self, x)
        return kernel(  # type: ignore[no-any-return]
            x, weight, self.bias, *self.geometry(), *pointwise(self.activation)
        )
