"""Every operator that can be spelled in ONNX: a node that a pass adds is written, and computes what the record does."""

from typing import Any

import pytest
import torch

from regauge.ir.errors import EmitError
from regauge.ir.operator import all_operators
from regauge.ir.ops.quantization import FLOATS
from regauge.spelling import OPSETS, check_sample, evaluated

SPELLED = {name: record for name, record in all_operators().items() if record.in_onnx and record.samples}

# Calls that ONNX has no words for, at all opsets together: statistics and random numbers of training, indices counted
# otherwise, windows of different sizes, roundings to decimals, smoothed and area resizing; in older opsets bits,
# float8, wrapped padding and triangles.
REFUSED = {
    "batch_norm": 8, "dropout": 4, "feature_dropout": 4, "max_pool": 4, "adaptive_max_pool": 8, "adaptive_avg_pool": 8,
    "round": 4, "local_response_norm": 4, "bitwise_and": 4, "bitwise_or": 4, "bitwise_xor": 4, "bitwise_not": 2,
    "scatter_nd": 4, "pad": 2, "tril": 2, "triu": 2, "interpolate": 8,
    "quantize": 4, "dequantize": 4, "fake_cast": 2,
}  # fmt: skip


def _is(operand: Any) -> bool:
    return isinstance(operand, torch.Tensor)


@pytest.mark.parametrize("name", sorted(SPELLED))
def test_spelled_operator_computes_what_the_record_does(name: str) -> None:
    refused = []
    for opset in OPSETS:
        torch.manual_seed(0)
        for index, sample in enumerate(SPELLED[name].samples()):  # type: ignore[misc]
            if any(tensor.dtype in FLOATS for tensor in (*sample.operands, *evaluated(name, sample)) if _is(tensor)):
                continue  # numpy has none of them: tests/passes/quantization/test_formats.py runs files with them
            try:
                check_sample(name, index, sample, opset)
            except EmitError as error:
                assert "cannot be written to ONNX" in str(error)
                refused.append((opset, index, str(error)))
    assert len(refused) == REFUSED.get(name, 0), refused
