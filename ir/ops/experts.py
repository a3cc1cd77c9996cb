"""Experts: one matrix per group of rows, as mixture-of-experts layers use them.

Rows are sorted by expert; ``offsets[i]`` is where the rows of expert i end. The number of experts is counted by the
router, so that axis keeps its indices; the residual width, and the width inside each expert, are free.
"""

from __future__ import annotations

import torch
from torch import randn

from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Value
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


@operator(
    rule="t i, e i o, e -> t o ; whole e t",
    aten={"_grouped_mm": _aten_grouped_mm, "transformers::grouped_mm_fallback": None},
    macs=lambda call: call.out() * call.size(0, 1),
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
