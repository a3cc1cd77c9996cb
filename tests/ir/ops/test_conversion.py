"""Casts: what is too large for floats of 8 bits, which ONNX and torch treat differently."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import regauge
from regauge.backends.run_onnxruntime import Session

LARGE = torch.tensor([1e6, -1e6, 60000.0, 465.0, 500.0, 240.0, 247.0, 249.0, 3.3, -0.0, 1e-9])
TYPES = {
    torch.float8_e5m2: TensorProto.FLOAT8E5M2,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
    torch.float8_e5m2fnuz: TensorProto.FLOAT8E5M2FNUZ,
    torch.float8_e4m3fnuz: TensorProto.FLOAT8E4M3FNUZ,
}


def _rounded_file(path: Path, code: int, **attributes: int) -> Path:
    nodes = [
        helper.make_node("Cast", ["x"], ["small"], to=code, **attributes),
        helper.make_node("Cast", ["small"], ["y"], to=TensorProto.FLOAT),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(LARGE)]) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "casts", values[:1], values[1:]), ir_version=10)
    model.opset_import[0].version = 21
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("saturate", [1, 0])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_files_round_as_onnxruntime_does(dtype: torch.dtype, saturate: int, tmp_path: Path) -> None:
    path = _rounded_file(tmp_path / "m.onnx", TYPES[dtype], saturate=saturate)
    (wanted,) = Session(path).run([LARGE])
    graph = regauge.load(path)
    torch.testing.assert_close(graph.run(LARGE)[0], wanted, rtol=0, atol=0, equal_nan=True)
    graph.to_onnx(tmp_path / "written.onnx")
    (written,) = Session(tmp_path / "written.onnx").run([LARGE])
    torch.testing.assert_close(written, wanted, rtol=0, atol=0, equal_nan=True)


class Rounding(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 1).to(self.dtype).to(torch.float32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_modules_round_in_files_as_in_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    module = Rounding(dtype)
    graph = regauge.capture(module, (LARGE,))
    graph.to_onnx(tmp_path / "m.onnx")
    (found,) = Session(tmp_path / "m.onnx").run([LARGE])
    torch.testing.assert_close(found, module(LARGE), rtol=0, atol=0, equal_nan=True)
