"""Layers of quantized graphs as emitted modules have them: their source is copied from here, without annotations.

Kernels by what was measured (docs/benchmarks.md): ``torch._int_mm`` for products of 8 bits, which is exact and on a CPU
as fast as oneDNN's fused kernels or faster, but for wide layers; oneDNN with signed inputs takes a thousand times as
long. The kernels for weights of 4 and 8 bits are worth it in bfloat16 only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def to_codes(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of 8 bits, halves to even: x ~ (q - zero_point) * scale."""
    return x.div(scale).round_().add_(zero_point).clamp_(-128, 127).to(torch.int8)


def plain_matmul(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 [..., k] times the rows of int8 [n, k] in 32 bits: by doubles, which hold all sums exactly."""
    return (q.double() @ weight.double().t()).to(torch.int32)


def int_matmul(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same by a kernel on integers, where there is one."""
    n, k = weight.shape
    if torch.onnx.is_in_onnx_export():
        shape = (*q.shape[:-1], n)
        operands = (q, weight.t())
        return torch.onnx.ops.symbolic("MatMulInteger", operands, dtype=torch.int32, shape=shape, version=10)
    if (
        torch.compiler.is_exporting() or not hasattr(torch, "_int_mm") or k == 1
    ):  # of one column it reads what is beside
        return plain_matmul(q, weight)
    rows = q.reshape(-1, k)
    if q.is_cuda and (len(rows) <= 16 or k % 8 or n % 8):  # cuBLAS takes no others
        return plain_matmul(q, weight)
    return torch._int_mm(rows, weight.t()).reshape(*q.shape[:-1], n)


def scaled(sums: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Sums of 32 bits as what they stand for, and the bias."""
    return sums * scale if bias is None else torch.addcmul(bias, sums, scale)


class QLinear(nn.Module):
    """y = x W^T + b on integers: x ~ (q - input_zero_point) * input_scale, W ~ weight * s.

    There is an s for each output, scale = input_scale * s, and offset is the sum of each row of
    weight times -input_zero_point: y = (q weight^T + offset) * scale + bias, the first sum in 32 bits.
    What is ``smoothed`` has an input_scale for each input, in parts of which weight was multiplied.
    """

    scale: torch.Tensor
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor
    offset: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, smoothed: bool = False) -> None:
        super().__init__()
        weight = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("offset", torch.zeros(out_features, dtype=torch.int32))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("input_scale", torch.ones(in_features if smoothed else ()))
        self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.int8))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor, matmul: Any = int_matmul) -> torch.Tensor:
        q = to_codes(x, self.input_scale, self.input_zero_point)
        return scaled(matmul(q, self.weight).add_(self.offset), self.scale, self.bias)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The same to the last bit, in plain torch."""
        return self.forward(x, plain_matmul)


class QLinearDynamic(nn.Module):
    """y = x W^T + b on integers: x ~ q * t, with t of each row as its entries need, W ~ weight * scale."""

    scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        weight = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", torch.ones(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor, matmul: Any = int_matmul) -> torch.Tensor:
        t = x.abs().amax(-1, keepdim=True).div_(127)
        t = torch.where(t > 0, t, 1.0)
        q = x.div(t).round_().to(torch.int8)
        y = scaled(matmul(q, self.weight), self.scale, None).mul_(t)
        return y if self.bias is None else y + self.bias

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The same to the last bit, in plain torch."""
        return self.forward(x, plain_matmul)


def float8_matmul(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Floats of 8 bits [..., k] times the rows of [n, k] in single precision: on a GPU by a kernel, if it has one."""
    n, k = weight.shape
    of_kernel = q.is_cuda and n % 16 == 0 and k % 16 == 0 and torch.cuda.get_device_capability(q.device) >= (8, 9)
    if not of_kernel or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return q.float() @ weight.float().t()
    one = torch.ones((), device=q.device)
    y = torch._scaled_mm(q.reshape(-1, k), weight.t(), one, one, out_dtype=torch.float32)
    return y.reshape(*q.shape[:-1], n)


class QLinearFloat8(nn.Module):
    """y = x W^T + b on floats of 8 bits: x ~ q * input_scale, W ~ weight * s.

    There is an s for each output, and scale = input_scale * s.
    """

    scale: torch.Tensor
    input_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        weight = torch.zeros(out_features, in_features, dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("input_scale", torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.div(self.input_scale).clamp_(-448, 448).to(torch.float8_e4m3fn)
        return scaled(float8_matmul(q, self.weight), self.scale, self.bias)


class QLinearFloat8Dynamic(nn.Module):
    """y = x W^T + b on floats of 8 bits: x ~ q * t, with t of each row a power of two as its entries need, W ~ weight *
    scale."""

    scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        weight = torch.zeros(out_features, in_features, dtype=torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", torch.ones(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        most = x.abs().amax(-1, keepdim=True).float()
        t = most.div(448).clamp_(min=2**-24)
        fraction = torch.frexp(t).mantissa
        t = torch.where((fraction > 0.5) & t.isfinite(), t / fraction, t)  # the least power of two that is not below
        t = torch.where(most > 0, t, 1.0)
        q = x.div(t).clamp_(-448, 448).to(torch.float8_e4m3fn)
        y = scaled(float8_matmul(q, self.weight), self.scale, None).mul_(t)
        return y if self.bias is None else y + self.bias


class QConv2d(nn.Module):
    """A convolution on integers; tensors as in QLinear, weight [out, height, width, in].

    The windows of x become rows, which are multiplied as in QLinear.
    """

    scale: torch.Tensor
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor
    offset: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        bias: bool = True,
    ) -> None:
        super().__init__()
        weight = torch.zeros(out_channels, *kernel_size, in_channels, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("offset", torch.zeros(out_channels, dtype=torch.int32))
        self.register_buffer("scale", torch.ones(out_channels))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.int8))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.stride, self.padding = stride, padding

    def forward(self, x: torch.Tensor, matmul: Any = int_matmul) -> torch.Tensor:
        (up, left), (down, right), kernel = self.padding, self.stride, self.weight.shape[1:3]
        x = F.pad(x, (left, left, up, up)).permute(0, 2, 3, 1)
        q = to_codes(x, self.input_scale, self.input_zero_point).contiguous()
        windows = q.unfold(1, kernel[0], down).unfold(2, kernel[1], right)  # [batch, h, w, in, *kernel]
        rows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
        y = scaled(matmul(rows, self.weight.flatten(1)).add_(self.offset), self.scale, self.bias)
        return y.permute(0, 3, 1, 2)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The same to the last bit, in plain torch."""
        return self.forward(x, plain_matmul)


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The codes 0 ... 2^bits - 1 of uint8 [rows, bytes] as uint8 [rows, count].

    Each code is cut into parts of 8, 4, 2 or 1 bits (three bits: the lower two, then the upper
    one). Parts of one width lie together, the first of them in the lowest bits of a byte.
    """
    codes, place, start = packed.new_zeros(()), 1, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            size = -(-count * width // 8)
            part = packed[:, start : start + size, None]
            # Divided, not shifted: torch's ONNX exporter shifts bytes as signed numbers.
            part = torch.cat([part // 2**at & 2**width - 1 for at in range(0, 8, width)], 2)
            codes = codes + place * part.flatten(1)[:, :count]
            place, start = place << width, start + size
    return codes


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many codes of a row."""
    return sum(-(-count * width // 8) for width in (8, 4, 2, 1) if bits & width)


class QLinearWeight(nn.Module):
    """y = x W^T + b, the weight in few bits: W ~ (q - zero_point) * scale.

    Scales and zero points are those of each group of inputs of an output. Codes and zero points
    are packed as unpack_bits() reads them; without zero points 2^(bits - 1) stands for 0.
    """

    zero_point: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        groups: int = 1,
        bias: bool = True,
        zero_points: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.bits = in_features, bits
        weight = torch.zeros(out_features, packed_size(in_features, bits), dtype=torch.uint8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.ones(out_features, groups), requires_grad=False)
        zeros = torch.zeros(out_features, packed_size(groups, bits), dtype=torch.uint8)
        self.register_buffer("zero_point", zeros if zero_points else None)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reference(x)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """With the weight in floating point, made anew for each call."""
        return F.linear(x, self.dense().to(x.dtype), self.bias)

    def dense(self) -> torch.Tensor:
        codes = unpack_bits(self.weight, self.bits, self.in_features).to(self.scale.dtype)
        grouped = codes.reshape(*self.scale.shape, -1) - self.zeros()[..., None]
        return (grouped * self.scale[..., None]).flatten(1)

    def zeros(self) -> torch.Tensor:
        """The codes of zero [out_features, groups], or one for all."""
        if self.zero_point is None:
            return torch.full_like(self.scale[:1, :1], 2 ** (self.bits - 1))
        return unpack_bits(self.zero_point, self.bits, self.scale.shape[1]).to(self.scale.dtype)


class QLinearWeightFast(QLinearWeight):
    """The same in bfloat16 by the kernels of a CPU that read integers, where there is one.

    They take 8 bits with a scale for each output, or up to 4 in groups of 32 to 256 inputs. What
    they are given is laid out at the first call, and kept beside the weight, but for pickle.
    """

    laid_out: tuple[Any, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu or x.requires_grad or torch.compiler.is_compiling():
            return self.reference(x)
        form, rows = self.kernel_form(), x.reshape(-1, self.in_features).to(torch.bfloat16)
        if form is None:
            return self.reference(x)
        if self.bits == 8:
            y = torch._weight_int8pack_mm(rows, *form)
        else:
            group = self.in_features // self.scale.shape[1]
            y = torch._weight_int4pack_mm_for_cpu(rows, form[0], group, form[1])
        y = y.reshape(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def kernel_form(self) -> Any:
        """Codes and scales as the kernel wants them, None where there is no kernel."""
        tensors = [t for t in (self.weight, self.scale, self.zero_point) if t is not None]
        key = [(t.data_ptr(), t._version) for t in tensors]
        if not self.laid_out or self.laid_out[0] != key:
            self.laid_out = (key, self.int8_form() if self.bits == 8 else self.int4_form())
        return self.laid_out[1]

    def int8_form(self) -> Any:
        fits = self.scale.shape[1] == 1 and self.in_features % 16 == 0
        if not fits or self.zero_point is not None or not hasattr(torch, "_weight_int8pack_mm"):
            return None
        return (self.weight ^ 128).view(torch.int8), self.scale[:, 0].to(torch.bfloat16)

    def int4_form(self) -> Any:
        """The kernel reads (q - 8) * scale + shift, in blocks of 16 outputs."""
        outputs, groups = self.scale.shape
        fits = self.in_features // groups in (32, 64, 128, 256) and outputs % 16 == 0
        if self.bits > 4 or not fits or not hasattr(torch, "_weight_int4pack_mm_for_cpu"):
            return None
        middle = 2 ** (self.bits - 1)  # of the codes: shifts are small beside it, and lose little
        codes = unpack_bits(self.weight, self.bits, self.in_features).int() + (8 - middle)
        scale = self.scale.to(torch.bfloat16)
        scales = torch.stack([scale, scale * (middle - self.zeros())], 2).to(torch.bfloat16)
        return torch._convert_weight_to_int4pack_for_cpu(codes, 1), scales.transpose(0, 1).contiguous()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "laid_out"}


class QConvWeight(QLinearWeight):
    """A convolution whose weight is stored in few bits, that of an output as a row of QLinearWeight."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        bits: int,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int = 1,
        bias: bool = True,
        zero_points: bool = True,
    ) -> None:
        self.shape = (out_channels, in_channels // groups, *kernel_size)
        columns = math.prod(self.shape[1:])
        super().__init__(columns, out_channels, bits, bias=bias, zero_points=zero_points)
        self.convolution = (F.conv1d, F.conv2d, F.conv3d)[len(kernel_size) - 1]
        self.options = (stride, padding, dilation, groups)

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.dense().reshape(self.shape).to(x.dtype)
        return self.convolution(x, weight, self.bias, *self.options)
