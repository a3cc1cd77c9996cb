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
from regauge.ir.operator import get_operator
from regauge.optimize import optimize

KINDS = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_a_gated_layer_with_dynamic_ranges_is_four_kernels(scheme: str) -> None:
    graph = optimize(gated_layer(4), f"quantize{{scheme={scheme},activations=dynamic,target=torch-cuda}}")
    found = with_kernels(graph)
    assert [node.op for node in found.graph.nodes] == ["fused"] * 4 and not found.left
    assert [operator.kernel.region.kind for operator in found.operators] == ["row reduction", "contraction"] * 2
    x = torch.randn(4, 64)
    torch.testing.assert_close(graph.to_torch(kernels="triton")(x), graph.to_torch()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40)])
def test_scales_and_codes_are_what_rows_are_quantized_to(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", shape, torch.float32)
    graph.outputs = list(build.quantize_rows(x, dtype=dtype))
    split = graph.copy()
    with_row_codes(split)
    assert [node.op for node in split.nodes] == ["row_scales", "row_codes"]
    tensor = torch.randn(shape)
    tensor[..., 0, :] = 0
    for own, other in zip(split.run(tensor), graph.run(tensor), strict=True):
        assert torch.equal(own.float(), other.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
def test_scales_of_floats_are_the_least_powers_of_two_that_hold_their_row(
    kind: torch.dtype, dtype: torch.dtype
) -> None:
    """Right at powers of two, and next to them, where a logarithm is rounded; tiny rows in half precision, too."""
    most = torch.finfo(kind).max
    ends = torch.tensor([most * 2.0**power for power in range(-20, 1)], dtype=dtype).nan_to_num(posinf=0.0)
    beside = [torch.nextafter(ends.float(), torch.tensor(end)).to(dtype) for end in (0.0, torch.inf)]
    step = [ends * (1 + sign * torch.finfo(dtype).eps) for sign in (-1, 1)]
    greatest = torch.cat([ends, *beside, *step, torch.tensor([3e-4, 1e-6], dtype=dtype)]).nan_to_num(posinf=1.0)
    x = greatest[:, None] * torch.tensor([0.3, -1.0, 0.0], dtype=dtype)
    codes, scales = get_operator("quantize_rows").evaluate(x, dtype=kind)
    wide, scale = x.double().abs().amax(1, keepdim=True), scales.double()
    assert bool((torch.frexp(scale).mantissa == 0.5).all())
    assert bool((wide / scale <= most * (1 + 2.0**-23)).all())  # the quotient is rounded
    assert bool(((wide > most * scale / 2) | (scale == 2.0**-24) | (wide == 0)).all())
    assert bool(codes.float().isfinite().all())


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_norm_is_in_the_kernel_that_rounds_its_rows(dtype: torch.dtype) -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (256, 1024), torch.float16)
    weight = build.parameter("w", torch.ones(1024).half())
    normed = build.rms_norm(x, weight, normalized_shape=(1024,), eps=1e-6)
    graph.outputs = list(build.quantize_rows(normed, dtype=dtype))
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
