"""Contractions: linear, matmul and their relatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import randn

from regauge.ir import scalars
from regauge.ir.axis_rules.rules import Call
from regauge.ir.edit import Builder
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Cost, OnnxForm, Symmetry, operator, sample
from regauge.ir.ops.onnx_nbits import read_matmul_nbits, write_matmul_nbits
from regauge.ir.shapes import common_shape
from regauge.ir.sizes.expressions import Size, product, same

# -- linear ------------------------------------------------------------------------------------------------------------


def _linear_layer(node: Node) -> str | None:
    weight = node.inputs[1]
    if not isinstance(weight, Value) or weight.rank != 2:
        return None
    bias = "" if len(node.inputs) > 2 else ", bias=False"
    return f"nn.Linear({weight.shape[1]}, {weight.shape[0]}{bias})"


def _spell_linear(onnx: Any, node: Node) -> Any:
    """Gemm takes matrices only (and wants a bias before opset 11); else MatMul with the weight turned, and Add."""
    matrices = isinstance(node.inputs[0], Value) and node.inputs[0].rank == 2
    if matrices and (onnx.given(2) or onnx.opset >= 11):
        return onnx.Gemm(*onnx.operands(3), transB=1)
    y = onnx.MatMul(onnx.operand(0), onnx.turned(1))
    return onnx.Add(y, onnx.operand(2)) if onnx.given(2) else y


def _linear_shape(x: Value, weight: Value, bias: Value | None = None) -> tuple[Size, ...] | None:
    fits = x.rank > 0 and weight.rank == 2 and x.shape[-1] == weight.shape[1]
    return (*x.shape[:-1], weight.shape[0]) if fits and (bias is None or bias.shape == weight.shape[:1]) else None


@operator(
    rule="... i, o i, o? -> ... o",
    shape=_linear_shape,
    aten={"linear": None},
    onnx={"com.microsoft::MatMulNBits": OnnxForm(read=read_matmul_nbits, write=write_matmul_nbits)},
    macs=lambda call: call.out() * call.size(1, -1),
    symmetry=Symmetry.PRODUCT,
    samples=lambda: [
        sample(randn(2, 3, 6), randn(4, 6), randn(4)),
        sample(randn(5, 6), randn(4, 6)),
        sample(randn(6), randn(4, 6), randn(4)),
    ],
    layer=_linear_layer,
    spell=_spell_linear,
    element=lambda x, weight, bias=None: scalars.affine(scalars.sum_(x * weight), None, bias),
)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight, bias)


# -- matmul ------------------------------------------------------------------------------------------------------------


def _matmul_rule(call: Call) -> str:
    left, right = call.rank(0), call.rank(1)
    if left == 1 and right == 1:
        return "k, k -> "
    if left == 1:
        return "k, ... k m -> ... m"
    if right == 1:
        return "... n k, k -> ... n"
    return "... n k, ... k m -> ... n m"


def _matmul_shape(x: Value, y: Value) -> tuple[Size, ...] | None:
    if not x.rank or not y.rank or x.shape[-1] != y.shape[max(y.rank - 2, 0)]:
        return None
    batch = common_shape([x.shape[:-2], y.shape[:-2]])
    return None if batch is None else (*batch, *x.shape[-2:-1], *(y.shape[-1:] if y.rank > 1 else ()))


def _accumulated(equation: str | None = None) -> Any:
    """``beta * bias + alpha * (x @ y)``: addmm, baddbmm, addmv; with an equation, products that are no plain matmul."""

    def adapt(build: Builder, bias: Any, x: Value, y: Value, *, beta: float = 1, alpha: float = 1) -> Any:
        result = build.matmul(x, y) if equation is None else build.einsum(x, y, equation=equation)
        result = result if alpha == 1 else build.mul(result, alpha)
        if beta == 0:
            return result
        return build.add(bias if beta == 1 else build.mul(bias, beta), result)

    return adapt


def _gemm(build: Builder, call: Any) -> Any:
    """Gemm(A, B, C) = alpha A' B' + beta C: a linear layer when B is stored (out, in), else a matmul."""
    x, weight = call.operand(0), call.operand(1)
    bias = call.operand(2) if call.has(2) else None
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    call.passes_over("broadcast")  # before opset 7; since then C always is
    if call.attribute("transA", 0):
        x = build.permute(x, dims=(1, 0))
    transposed = bool(call.attribute("transB", 0))
    plain_bias = bias is None or (beta == 1 and bias.rank == 1 and same(bias.shape[0], weight.shape[0]))
    if transposed and alpha == 1 and plain_bias:
        return build.linear(x, weight, bias)
    if transposed:
        weight = build.permute(weight, dims=(1, 0))
    if bias is None:
        bias, beta = 0, 0
    return _accumulated()(build, bias, x, weight, beta=beta, alpha=alpha)


@operator(
    rule=_matmul_rule,
    shape=_matmul_shape,
    aten={
        "matmul": None, "bmm": None, "mm": None, "mv": None, "dot": None, "linalg_matmul": None,
        "vdot": lambda build, x, y: build.matmul(build.conj(x) if x.dtype.is_complex else x, y),
        "addmm": _accumulated(), "baddbmm": _accumulated(), "addmv": _accumulated(),
        "addbmm": _accumulated("bij,bjk->ik"), "addr": _accumulated("i,j->ij"),
    },
    onnx={"MatMul": None, "Gemm": _gemm},
    macs=lambda call: call.out() * call.size(0, -1),
    symmetry=Symmetry.PRODUCT,
    samples=lambda: [
        sample(randn(2, 3, 4), randn(2, 4, 5)),
        sample(randn(3, 4), randn(4, 5)),
        sample(randn(2, 1, 3, 4), randn(5, 4, 3)),
        sample(randn(4), randn(4, 3)),
        sample(randn(4), randn(2, 4, 3)),
        sample(randn(2, 3, 4), randn(4)),
        sample(randn(4), randn(4)),
    ],
    element=lambda x, y: scalars.sum_(x * y),
)  # fmt: skip
def matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.matmul(x, y)


# -- bilinear ----------------------------------------------------------------------------------------------------------


def _bilinear_layer(node: Node) -> str | None:
    weight = node.inputs[2]
    if not isinstance(weight, Value):
        return None
    outputs, left, right = weight.shape
    return f"nn.Bilinear({left}, {right}, {outputs}{'' if len(node.inputs) > 3 else ', bias=False'})"


def _bilinear_macs(call: Cost) -> Size:
    return product((call.out(), call.size(2, 1), call.size(2, 2))) + product((call.out(), call.size(2, 2)))


@operator(
    rule="... i, ... j, o i j, o? -> ... o",
    aten={"bilinear": None},
    macs=_bilinear_macs,
    symmetry=Symmetry.PRODUCT,
    samples=lambda: [
        sample(randn(2, 3), randn(2, 4), randn(5, 3, 4), randn(5)),
        sample(randn(2, 6, 3), randn(2, 6, 4), randn(5, 3, 4)),
    ],
    layer=_bilinear_layer,
)
def bilinear(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.bilinear(x, y, weight, bias)
