"""Rows rounded by their own ranges when they run: one kernel with what gives them, and products of their codes."""

from pathlib import Path

import onnx
import pytest
import torch

import regauge
from quantized_graphs import gated_layer
from regauge.backends.torch_module.kernels import with_kernels
from regauge.backends.triton_kernels.weights import with_row_codes
from regauge.ir.edit import Builder
from regauge.ir.fusion.plan import plan_fusion
from regauge.ir.graph import Graph
from regauge.optimize import optimize

DYNAMIC = "quantize{scheme=w8a8,activations=dynamic,target=torch-cuda}"


def test_a_gated_layer_with_dynamic_ranges_is_four_kernels() -> None:
    graph = optimize(gated_layer(4), DYNAMIC)
    found = with_kernels(graph)
    assert [node.op for node in found.graph.nodes] == ["fused"] * 4 and not found.left
    assert [operator.kernel.region.kind for operator in found.operators] == ["row reduction", "contraction"] * 2
    x = torch.randn(4, 64)
    torch.testing.assert_close(graph.to_torch(kernels="triton")(x), graph.to_torch()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40)])
def test_scales_and_codes_are_what_rows_are_quantized_to(shape: tuple[int, ...]) -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", shape, torch.float32)
    graph.outputs = list(build.quantize_rows(x))
    split = graph.copy()
    with_row_codes(split)
    assert [node.op for node in split.nodes] == ["row_scales", "row_codes"]
    tensor = torch.randn(shape)
    tensor[..., 0, :] = 0
    for own, other in zip(split.run(tensor), graph.run(tensor), strict=True):
        assert torch.equal(own, other)


def test_a_norm_is_in_the_kernel_that_rounds_its_rows() -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (256, 1024), torch.float16)
    weight = build.parameter("w", torch.ones(1024).half())
    graph.outputs = list(build.quantize_rows(build.rms_norm(x, weight, normalized_shape=(1024,), eps=1e-6)))
    with_row_codes(graph)
    plan = plan_fusion(graph)
    assert [[node.op for node in region.nodes] for region in plan.regions] == [["rms_norm", "row_scales", "row_codes"]]
    assert plan.bytes == 256 * 1024 * 2 + 1024 * 2 + 256 * 1024 + 256 * 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_norm_is_in_the_kernel_that_rounds_to_floats_of_8_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """And in one function of a file, which gives the same numbers."""
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (256, 1024), torch.float32)
    normed = build.rms_norm(x, build.parameter("w", torch.ones(1024)), normalized_shape=(1024,), eps=1e-6)
    scale = build.parameter("s", torch.tensor(2.0**-8))
    graph.outputs = [build.quantize(normed, scale, dtype=dtype)]
    plan = plan_fusion(graph)
    assert [[node.op for node in region.nodes] for region in plan.regions] == [["rms_norm", "quantize"]]
    assert plan.bytes == 256 * 1024 * 4 + 1024 * 4 + 4 + 256 * 1024
    graph.outputs = [build.dequantize(graph.outputs[0], scale)]  # onnxruntime gives no float of 8 bits out
    optimize(graph, "fuse").to_onnx(tmp_path / "codes.onnx", functions=True)
    (function,) = onnx.load(tmp_path / "codes.onnx").functions
    assert [node.op_type for node in function.node][-2:] == ["QuantizeLinear", "DequantizeLinear"]
    numbers = torch.randn(256, 1024)
    assert torch.equal(regauge.load(tmp_path / "codes.onnx").run(numbers)[0], graph.run(numbers)[0])
