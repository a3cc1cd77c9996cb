"""Layers of few bits as onnxruntime's own operator has them: read as the dequantization that they mean."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import regauge
from regauge.backends.run_onnxruntime import Session

OUTPUTS = 24


def model(bits: int, inputs: int, block: int, zeros: str) -> onnx.ModelProto:
    """Two such layers behind one another, the first with a bias."""
    draw = np.random.default_rng(0)
    weights, nodes, x = [], [], "x"
    for layer, (columns, rows) in enumerate(((inputs, OUTPUTS), (OUTPUTS, 8))):
        blocks = -(-columns // block)
        parts = {
            f"q{layer}": draw.integers(0, 256, (rows, blocks, block * bits // 8)).astype(np.uint8),
            f"s{layer}": (0.1 * draw.random(rows * blocks) + 0.05).astype(np.float32),
        }
        if zeros == "codes":
            parts[f"z{layer}"] = draw.integers(0, 256, rows * -(-blocks * bits // 8)).astype(np.uint8)
        elif zeros == "floats":
            parts[f"z{layer}"] = (draw.random(rows * blocks) * (1 << bits)).astype(np.float32)
        names = [*parts, *([""] if zeros == "none" else []), "", "b"] if layer == 0 else [*parts]
        weights += [numpy_helper.from_array(value, name) for name, value in parts.items()]
        sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block}
        nodes.append(helper.make_node("MatMulNBits", [x, *names], [f"y{layer}"], domain="com.microsoft", **sizes))
        x = f"y{layer}"
        if layer == 0:
            nodes.append(helper.make_node("Tanh", [x], ["r"]))
            x = "r"
    weights.append(numpy_helper.from_array(draw.standard_normal(OUTPUTS).astype(np.float32), "b"))
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, inputs])]
    outputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", 3, 8])]
    graph = helper.make_graph(nodes, "few", given, outputs, weights)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=8)


@pytest.mark.parametrize(
    ("bits", "inputs", "zeros"),
    [(4, 64, "none"), (4, 64, "codes"), (4, 64, "floats"), (4, 50, "none"), (4, 50, "codes"), (4, 50, "floats"),
     (8, 64, "none"), (8, 64, "codes")],
)  # fmt: skip
def test_they_are_linear_layers_on_what_blocks_stand_for(tmp_path: Path, bits: int, inputs: int, zeros: str) -> None:
    onnx.save(model(bits, inputs, 16, zeros), tmp_path / "m.onnx")
    graph = regauge.load(tmp_path / "m.onnx")
    assert [node.op for node in graph.nodes if node.op in ("linear", "onnx_opaque")] == ["linear", "linear"]
    x = torch.randn(5, 3, inputs)
    (wanted,), (found,) = Session(tmp_path / "m.onnx").run((x,)), graph.run((x,))
    assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()))
    graph.to_onnx(tmp_path / "same.onnx")
    kept = [node.op_type for node in onnx.load(tmp_path / "same.onnx").graph.node]
    assert kept == ["MatMulNBits", "Tanh", "MatMulNBits"]
    floats = regauge.optimize(graph, "dequantize")
    assert [node.op for node in floats.nodes] == ["linear", "tanh", "linear"]
    floats.to_onnx(tmp_path / "floats.onnx")
    (again,) = Session(tmp_path / "floats.onnx").run((x,))
    assert torch.allclose(again, found, atol=1e-5 * float(wanted.abs().max()))


def test_their_outputs_are_pruned(tmp_path: Path) -> None:
    onnx.save(model(4, 64, 8, "none"), tmp_path / "m.onnx")
    graph = regauge.load(tmp_path / "m.onnx")
    small = regauge.optimize(graph, "dequantize,prune{ratio=0.5},quantize{scheme=w8}")
    x = torch.randn(5, 3, 64)
    small.to_onnx(tmp_path / "small.onnx")
    (found,), (wanted,) = Session(tmp_path / "small.onnx").run((x,)), small.run((x,))
    assert torch.allclose(found, wanted, atol=0.03 * float(wanted.abs().max()))
    assert {tuple(p.shape)[0] for p in small.all_parameters() if len(p.shape) == 2} <= {12, 8, 64}
