"""Experts: one matrix per group of rows, as mixture-of-experts layers use them.

Rows are sorted by expert; ``offsets[i]`` is where the rows of expert i end. The number of experts is counted by the
router, so that axis keeps its indices; the residual width, and the width inside each expert, are free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Node, Value
from regauge.ir.operator import Symmetry, operator, sample


def _aten_grouped_mm(
    build: Builder,
    x: Value,
    weight: Value,
    offsets: Value | None = None,
    bias: Value | None = None,
    out_dtype: torch.dtype | None = None,
) -> Value:
    if bias is not None or (out_dtype is not None and out_dtype != x.dtype):
        raise OperatorError("_grouped_mm with a bias or another result type has no rule")
    if offsets is None and x.rank == weight.rank == 3:
        return build.matmul(x, weight)  # type: ignore[no-any-return]
    if offsets is None or x.rank != 2 or weight.rank != 3:
        raise OperatorError("_grouped_mm has a rule for rows that are grouped by offsets, with one matrix per group")
    return build.grouped_mm(x, weight, offsets)  # type: ignore[no-any-return]


def _spell(onnx: Any, node: Node) -> Any:
    """One Split of the rows by how many each expert has, a product for each, and zeros behind the last.

    A runtime folds what takes the weight apart; an expert without rows costs a product of none.
    """
    weight = node.inputs[1]
    assert isinstance(weight, Value)
    count = weight.shape[0]
    if not isinstance(count, int):
        raise onnx.refusal(f"it has the dynamic number of {count} experts")
    if onnx.opset < 13:
        raise onnx.refusal(f"the sizes of Split are not computed in opset {onnx.opset}: convert it to 13 or newer")
    x, matrices, ends = onnx.operand(0), onnx.operand(1), onnx.operand(2, torch.int64)
    zero, one = onnx.constant([0]), onnx.constant([1])
    size = onnx.Slice(onnx.Shape(x), zero, one)
    counts = onnx.Sub(onnx.Concat(ends, size, axis=0), onnx.Concat(zero, ends, axis=0))
    *groups, rest = onnx.Split(x, counts, outputs=count + 1, axis=0)
    products = [onnx.MatMul(rows, onnx.Gather(matrices, onnx.constant(e), axis=0)) for e, rows in enumerate(groups)]
    shape = onnx.Concat(onnx.Slice(onnx.Shape(rest), zero, one), onnx.sizes(weight.shape[2:]), axis=0)
    return onnx.Concat(*products, onnx.Expand(onnx.constant(0, node.outputs[0].dtype), shape), axis=0)


@operator(
    rule="t i, e i o, e -> t o ; whole e t",
    aten={"_grouped_mm": _aten_grouped_mm, "transformers::grouped_mm_fallback": None},
    macs=lambda call: call.out() * call.size(0, 1),
    spell=_spell,
    spelled_for_torch=True,
    samples=lambda: [
        sample(randn(7, 4), randn(3, 4, 5), torch.tensor([2, 2, 7], dtype=torch.int32)),
        sample(randn(6, 4), randn(2, 4, 3), torch.tensor([5, 5])),
    ],
    symmetry=Symmetry.PRODUCT,
    zeroed_by=("x", "weight"),
)
def grouped_mm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows behind the last offset belong to no expert and give zeros."""
    result = x.new_zeros(x.shape[0], weight.shape[2])
    if type(offsets) is torch.Tensor and not offsets.is_meta and not torch.compiler.is_compiling():
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            result[start:end] = x[start:end] @ weight[expert]
            start = end
        return result
    # Where sizes must not depend on data every expert sees every row, and a row keeps what its own expert gave.
    row = torch.arange(x.shape[0], device=x.device)
    for expert in range(weight.shape[0]):
        mine = row < offsets[expert] if expert == 0 else (row >= offsets[expert - 1]) & (row < offsets[expert])
        result = torch.where(mine[:, None], x @ weight[expert], result)
    return result
