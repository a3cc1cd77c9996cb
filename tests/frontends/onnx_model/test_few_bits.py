"""Constants of 4 and 2 bits in ONNX files: read as what they stand for, and written as they were."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import regauge
from regauge.backends.onnx_model.audit import kernels_of
from regauge.backends.run_onnxruntime import Session

INPUTS, HIDDEN, BLOCK = 64, 48, 32


def packed(name: str, kind: int, shape: tuple[int, int], draw: np.random.Generator) -> TensorProto:
    signed = kind in (TensorProto.INT4, TensorProto.INT2)
    span = 4 if kind in (TensorProto.INT2, TensorProto.UINT2) else 16
    codes = draw.integers(-span // 2, span // 2, shape) if signed else draw.integers(0, span, shape)
    return numpy_helper.from_array(codes.astype(helper.tensor_dtype_to_np_dtype(kind)), name)


def model(kind: int, opset: int = 21, *, elsewhere: bool = False) -> onnx.ModelProto:
    """Two products with constants of few bits in blocks; ``elsewhere``: another node reads the first constant, too."""
    draw = np.random.default_rng(0)
    weights, nodes, x = [], [], "x"
    for layer, (inputs, outputs) in enumerate(((INPUTS, HIDDEN), (HIDDEN, 8))):
        block = BLOCK if inputs % BLOCK == 0 else 16
        scale = (0.1 * draw.random((inputs // block, outputs)) + 0.05).astype(np.float32)
        weights += [
            packed(f"q{layer}", kind, (inputs, outputs), draw),
            numpy_helper.from_array(scale, f"s{layer}"),
            packed(f"z{layer}", kind, (inputs // block, outputs), draw),
        ]
        names = [f"q{layer}", f"s{layer}", f"z{layer}"]
        nodes.append(helper.make_node("DequantizeLinear", names, [f"w{layer}"], axis=0, block_size=block))
        nodes.append(helper.make_node("MatMul", [x, f"w{layer}"], [f"y{layer}"]))
        x = f"y{layer}"
        if layer == 0:
            nodes.append(helper.make_node("Tanh", [x], ["r"]))
            x = "r"
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", 8])]
    if elsewhere:
        nodes.append(helper.make_node("Cast", ["q0"], ["floats"], to=TensorProto.FLOAT))
        outputs.append(helper.make_tensor_value_info("floats", TensorProto.FLOAT, [INPUTS, HIDDEN]))
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", INPUTS])]
    graph = helper.make_graph(nodes, "few", given, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10 if opset < 25 else 13)


def constants(path: Path) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4])
def test_they_are_dequantized_in_the_graph(tmp_path: Path, kind: int, recwarn: pytest.WarningsRecorder) -> None:
    onnx.save(model(kind), tmp_path / "m.onnx")
    graph = regauge.load(tmp_path / "m.onnx")
    assert not recwarn.list
    assert [n.attributes["bits"] for n in graph.nodes if n.op == "dequantize"] == [4, 4]
    assert graph.parameters["q0"].dtype == (torch.int8 if kind == TensorProto.INT4 else torch.uint8)
    x = torch.randn(5, INPUTS)
    wanted = Session(tmp_path / "m.onnx", optimisation="off").run([x])[0]
    assert float((graph.run((x,))[0] - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_of_two_bits() -> None:
    graph = regauge.load(model(TensorProto.UINT2, opset=25))
    assert [n.attributes["bits"] for n in graph.nodes if n.op == "dequantize"] == [2, 2]
    assert int(graph.parameters["q0"].tensor.max()) == 3


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4])
def test_what_is_not_cut_stays_as_it_was_and_what_is_keeps_its_type(tmp_path: Path, kind: int) -> None:
    """Blocks of the second product are cut whole, outputs of the first one by one; the kernel for blocks reads both."""
    onnx.save(model(kind), tmp_path / "m.onnx")
    graph = regauge.load(tmp_path / "m.onnx")
    cut = regauge.optimize(graph, "prune{ratio=0.4,compensate=false}")
    left = cut.parameters["q0"].shape[1]
    assert left < HIDDEN and cut.parameters["q1"].shape[0] == left and cut.parameters["s1"].shape[0] == left // 16
    cut.to_onnx(tmp_path / "cut.onnx")
    before, after = constants(tmp_path / "m.onnx"), constants(tmp_path / "cut.onnx")
    assert {name: tensor.data_type for name, tensor in after.items()} == {n: t.data_type for n, t in before.items()}
    assert kernels_of(tmp_path / "cut.onnx")[0]["MatMulNBits"] == 2
    regauge.load(tmp_path / "m.onnx").to_onnx(tmp_path / "same.onnx", external_data=True)
    assert (tmp_path / "same.onnx.data").exists()
    for name, tensor in constants(tmp_path / "same.onnx").items():
        assert tensor.raw_data == before[name].raw_data and tensor.data_type == before[name].data_type


@pytest.mark.parametrize("first", [True, False])
def test_a_constant_that_others_read_too(tmp_path: Path, first: bool) -> None:
    """Whoever comes first says how it is held; both compute the same."""
    given = model(TensorProto.UINT4, elsewhere=True)
    if first:
        given.graph.node.insert(0, given.graph.node.pop())
    onnx.save(given, tmp_path / "m.onnx")
    with warnings.catch_warnings(record=True) as kept:
        graph = regauge.load(tmp_path / "m.onnx")
    assert bool(kept) == first
    x = torch.randn(5, INPUTS)
    for found, wanted in zip(graph.run((x,)), Session(tmp_path / "m.onnx", optimisation="off").run([x]), strict=True):
        assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_one_that_cannot_be_dequantized_here_is_run_as_it_is(tmp_path: Path) -> None:
    given = model(TensorProto.INT4)
    given.graph.node[0].attribute.append(helper.make_attribute("output_dtype", TensorProto.FLOAT))
    del given.opset_import[:]
    given.opset_import.append(helper.make_opsetid("", 23))
    onnx.save(given, tmp_path / "m.onnx")
    with pytest.warns(regauge.RegaugeWarning, match="kept as they are"):
        graph = regauge.load(tmp_path / "m.onnx")
    x = torch.randn(5, INPUTS)
    wanted = Session(tmp_path / "m.onnx", optimisation="off").run([x])[0]
    assert float((graph.run((x,))[0] - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
