"""Contractions: linear, matmul and their relatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import randn

from regauge.ir.operator import OnnxForm, operator, sample


def _linear_layer(node):  # type: ignore[no-untyped-def]
    weight = node.inputs[1]
    return f"nn.Linear({weight.shape[1]}, {weight.shape[0]}, bias={len(node.inputs) > 2})"


@operator(
    rule="... i, o i, o? -> ... o",
    aten={"linear": None},
    macs=lambda call: call.out() * call.size(1, 1),
    samples=lambda: [sample(randn(2, 3, 6), randn(4, 6), randn(4)), sample(randn(5, 6), randn(4, 6))],
    layer=_linear_layer,
)
def linear(x, weight, bias=None):
    return F.linear(x, weight, bias)


def _matmul_rule(call):  # type: ignore[no-untyped-def]
    left, right = call.rank(0), call.rank(1)
    if left == 1 and right == 1:
        return "k, k -> "
    if left == 1:
        return "k, ... k m -> ... m"
    if right == 1:
        return "... n k, k -> ... n"
    return "... n k, ... k m -> ... n m"


@operator(
    rule=_matmul_rule,
    aten={"matmul": None, "bmm": None, "mm": None, "mv": None, "dot": None},
    onnx={"MatMul": None},
    macs=lambda call: call.out() * call.size(0, -1),
    samples=lambda: [
        sample(randn(2, 3, 4), randn(2, 4, 5)),
        sample(randn(3, 4), randn(4, 5)),
        sample(randn(2, 1, 3, 4), randn(5, 4, 3)),
        sample(randn(4), randn(4, 3)),
        sample(randn(2, 3, 4), randn(4)),
        sample(randn(4), randn(4)),
    ],
)
def matmul(x, y):
    return torch.matmul(x, y)


def _addmm(build, bias, x, y, *, beta=1, alpha=1):  # type: ignore[no-untyped-def]
    product = build.matmul(x, y)
    if alpha != 1:
        product = build.mul(product, alpha)
    if beta != 1:
        bias = build.mul(bias, beta)
    return build.add(product, bias)


def _gemm(build, call):  # type: ignore[no-untyped-def]
    """Gemm(A, B, C) = alpha A' B' + beta C: a linear layer when B is stored (out, in), else a matmul."""
    x, weight = call.operand(0), call.operand(1)
    bias = call.operand(2) if call.has(2) else None
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    if call.attribute("transA", 0):
        x = build.permute(x, dims=(1, 0))
    if call.attribute("transB", 0) and alpha == 1 and (bias is None or (beta == 1 and bias.rank == 1)):
        return build.linear(x, weight, bias)
    if call.attribute("transB", 0):
        weight = build.permute(weight, dims=(1, 0))
    product = build.matmul(x, weight)
    if alpha != 1:
        product = build.mul(product, alpha)
    if bias is None or beta == 0:
        return product
    return build.add(product, bias if beta == 1 else build.mul(bias, beta))
