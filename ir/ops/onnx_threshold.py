"""The rectifier with a threshold as ONNX has it: torch's ``threshold`` keeps NaN, this one does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, randn

from regauge.ir import scalars
from regauge.ir.graph import Node
from regauge.ir.operator import OnnxForm, sample
from regauge.ir.ops.elementwise import pointwise


def _read(build: Any, call: Any) -> Any:
    return build.thresholded_relu(call.operand(0), alpha=call.attribute("alpha", 1.0))


def _spell(onnx: Any, node: Node) -> Any:
    """One operator from opset 10 on; onnxruntime has it for no double numbers."""
    x, alpha = onnx.operand(0), float(node.attributes["alpha"])
    if onnx.opset >= THRESHOLDED_SINCE and node.output.dtype in RUN_WHOLE:
        return onnx.ThresholdedRelu(x, alpha=alpha)
    return onnx.Where(onnx.Greater(x, alpha), x, 0.0)


THRESHOLDED_SINCE = 10  # opset
RUN_WHOLE = (torch.float32, torch.float16)
"""The types for which onnxruntime has a kernel on a CPU."""


@pointwise(
    onnx={"ThresholdedRelu": OnnxForm(read=_read)},
    spell=_spell,
    samples=lambda: [sample(randn(2, 3, 4)), sample(randn(2, 3).log(), alpha=0.0)],
    element=lambda x, alpha: scalars.where(x > alpha, x, 0.0),
)
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``x`` where it is more than ``alpha``, else zero: of NaN, too, which is more than nothing."""
    return torch.where(x > alpha, x, 0)
