"""Filters that mirror themselves: half of them is stored, and the other half made of it at load."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import regauge
from regauge.backends.run_onnxruntime import Session
from regauge.passes.quantization.levels import Levels
from regauge.passes.quantization.mirrored import Mirrored, mirrored, table_of


def fourier(length: int, periodic: bool = True) -> torch.Tensor:
    """[2 frequencies, places]: cosines and sines under a window, symmetric about a place or between two."""
    n = torch.arange(length).double() + (0 if periodic else 0.5)
    waves = 2 * torch.pi * torch.arange(length // 2 + 1).double()[:, None] * n / length
    return torch.cat([waves.cos(), waves.sin()]) * torch.sin(torch.pi * n / length).square()


@pytest.mark.parametrize(("length", "periodic"), [(128, True), (128, False), (63, True), (63, False)])
def test_half_of_a_fourier_basis_gives_all_of_it(length: int, periodic: bool) -> None:
    basis = fourier(length, periodic)
    form = mirrored(basis, length, Levels())
    assert form is not None and form.kept == (length // 2 + 1 if periodic else (length + 1) // 2)
    found = form.rounded(basis, torch.rand(length))
    assert found.half.codes.shape == (len(basis), form.kept)
    whole = Levels().rounded(basis)
    assert (found.values - basis).square().sum() <= (whole.values - basis).square().sum() + 1e-9
    assert found.bits < 0.6 * whole.bits + 16 * len(basis)


def test_what_is_not_its_own_mirror_image_has_a_whole_table() -> None:
    torch.manual_seed(0)
    basis = fourier(256)
    assert isinstance(table_of(basis, (258, 1, 256), 0), Mirrored)
    assert isinstance(table_of(basis[:40], (40, 1, 256), 0), Levels)  # half of it is too small for a table
    one_off = basis.clone()
    one_off[3, 7] += 1e-4
    assert isinstance(table_of(one_off, (258, 1, 256), 0), Levels)
    assert isinstance(table_of(torch.randn(256, 128), (256, 128), 0), Levels)
    assert isinstance(table_of(fourier(128).repeat_interleave(2, 1), (130, 128, 2), 0), Levels)  # not along the places


@pytest.mark.parametrize("layout", ["conv", "matmul", "in a branch"])
def test_a_file_holds_half_of_such_filters_and_computes_with_all_of_them(layout: str, tmp_path: Path) -> None:
    basis = fourier(128).numpy().astype(np.float32)
    weight = basis.T.copy() if layout == "matmul" else basis[:, None]
    make, op = helper.make_node, "MatMul" if layout == "matmul" else "Conv"
    tensor, kind = numpy_helper.from_array(weight, "basis"), TensorProto.FLOAT
    x = helper.make_tensor_value_info("x", kind, [2, 128] if layout == "matmul" else [2, 1, 160])
    y = helper.make_tensor_value_info("y", kind, None)
    inputs, nodes, tensors = [x], [make(op, ["x", "basis"], ["y"])], [tensor]
    if layout == "in a branch":
        given = helper.make_tensor_value_info("given", TensorProto.BOOL, [])
        inner = helper.make_tensor_value_info("inner", kind, None)
        then = helper.make_graph([make(op, ["x", "basis"], ["inner"])], "then", [], [inner], [tensor])
        other = helper.make_graph([make("Neg", ["x"], ["inner"])], "other", [], [inner])
        inputs, tensors = [x, given], []
        nodes = [make("If", ["given"], ["y"], then_branch=then, else_branch=other)]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, [y], tensors), ir_version=9)
    model.opset_import[0].version = 17
    result = regauge.optimize(regauge.load(model), "quantize{scheme=w8}", data=None)
    path = result.to_onnx(tmp_path / "halved.onnx")
    assert path.stat().st_size < 0.51 * weight.size + 2600  # half of the bytes of 8 bits, and the nodes
    batch = {"x": torch.randn(2, 128) if layout == "matmul" else torch.randn(2, 1, 160)}
    batch |= {"given": torch.tensor(True)} if layout == "in a branch" else {}
    onnx.save(model, tmp_path / "float.onnx")
    (found,), (wanted,) = (Session(file).run(batch) for file in (path, tmp_path / "float.onnx"))
    assert (found - wanted).square().mean() < 1e-9 * wanted.square().mean()
    if layout != "in a branch":
        floats = regauge.optimize(result, "dequantize")
        assert not {"codebook", "flip"} & {node.op for node in floats.nodes}
        assert torch.allclose(floats.run(batch)[0], result.run(batch)[0], atol=1e-6)
