"""Convolutions over any number of spatial axes, grouped, depthwise and transposed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import randn

from regauge.ir.operator import operator, sample
from regauge.ir.sizes import product


@operator(
    rule="n (g i) s..., (g o) i k..., (g o)? -> n (g o) t... ; window s k t ; groups = g",
    macs=lambda call: call.out() * product(call.node.inputs[1].shape[1:]),
    samples=lambda: [
        sample(randn(2, 6, 5, 5), randn(8, 3, 3, 3), randn(8), padding=(1, 1), groups=2),
        sample(randn(2, 4, 7), randn(4, 1, 3), None, stride=(2,), groups=4),
    ],
)
def conv(x, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1):
    return (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3](x, weight, bias, stride, padding, dilation, groups)
