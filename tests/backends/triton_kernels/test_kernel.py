"""Kernels printed from regions: their text, what is refused, and what they compute in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_forms import FORMS, form_graph
from regauge.backends.triton_kernels.attention_gradient import (
    BIAS_FORMS,
    GRADIENT_FORMS,
    WIDE_FORMS,
    AttentionGradientKernel,
)
from regauge.backends.triton_kernels.bias_gradient import BiasGradientKernel
from regauge.backends.triton_kernels.compile import compile_kernel
from regauge.backends.triton_kernels.kernel import Form, Kernel, launch_of, triton_kernel
from regauge.ir.edit import Builder
from regauge.ir.errors import FusionError
from regauge.ir.fusion.attention_gradients import attention_gradient, bias_gradient, biases_of
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph
from regauge.ir.scalars import ROUNDED_8

HERE = Path(__file__).parent
INTERPRETED = [HERE / "interpreted_kernels.py", HERE / "interpreted_limits.py"]
HAS_TRITON = importlib.util.find_spec("triton") is not None


def kernel_of(graph: Graph, name: str = "kernel", **options: object) -> Kernel:
    return triton_kernel(trace(graph.nodes, graph.outputs), name, **options)  # type: ignore[arg-type]


def run_interpreted(*options: str) -> None:
    """The tests of kernels in a process in which Triton interprets: wrong addresses end it, repairs stay in it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, INTERPRETED), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[2])
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_interpreted_kernels() -> None:
    run_interpreted()


@pytest.mark.nightly
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_many_interpreted_kernels() -> None:
    run_interpreted("-m", "nightly")


@pytest.mark.parametrize("name", FORMS)
def test_text_is_python_and_says_what_it_reads(name: str) -> None:
    kernel = kernel_of(form_graph(name, torch.bfloat16), name)
    for form in kernel.forms:
        for contiguous in (True, False):
            source = kernel.source(form, contiguous=contiguous)
            compile(source.text, name, "exec")
            assert max(map(len, source.text.splitlines())) <= 120
            assert all(f" {tensor.name}[" in source.text for tensor in source.tensors)
            assert "tl.int64" in source.text and "rounding  fused" in source.text


def test_neighbouring_axes_are_one_loop_where_memory_allows() -> None:
    kernel = kernel_of(form_graph("gated_rms_norm", torch.float16))
    flat, strided = kernel.source(), kernel.source(contiguous=False)
    assert [loop.name for loop in flat.loops.all] == ["i0", "r0"]
    assert [loop.name for loop in strided.loops.all] == ["i0", "i1", "r0"]


def test_text_of_an_add_and_norm(golden: object) -> None:
    kernel = kernel_of(form_graph("add_rms_norm", torch.bfloat16), "add_rms_norm", rounding="eager")
    golden("kernel_add_rms_norm", kernel.source().text)  # type: ignore[operator]


def test_text_of_a_looped_softmax(golden: object) -> None:
    kernel = kernel_of(form_graph("softmax", torch.float16), "softmax")
    golden("kernel_softmax_looped", kernel.source("looped").text)  # type: ignore[operator]


def test_text_of_causal_attention(golden: object) -> None:
    kernel = kernel_of(form_graph("causal_attention", torch.bfloat16), "attention")
    joined = kernel.source("split").then
    assert joined is not None
    golden("kernel_causal_attention", kernel.source().text + joined.text)  # type: ignore[operator]


def test_text_of_attention_to_codes_of_four_bits(golden: object) -> None:
    kernel = kernel_of(form_graph("int4_cache_attention", torch.bfloat16), "attention")
    golden("kernel_int4_cache_attention", kernel.source().text.rstrip("\n"))  # type: ignore[operator]


def test_text_of_attention_with_keys_of_latents(golden: object) -> None:
    kernel = kernel_of(form_graph("turned_latents_attention", torch.float16), "attention")
    golden("kernel_latent_attention", kernel.source().text.rstrip("\n"))  # type: ignore[operator]


def test_text_of_attention_with_values_of_latents(golden: object) -> None:
    kernel = kernel_of(form_graph("latent_values_attention", torch.float16), "attention")
    golden("kernel_latent_values", kernel.source("split").text.rstrip("\n"))  # type: ignore[operator]


def test_text_of_the_gradients_of_attention(golden: object) -> None:
    graph = form_graph("causal_attention", torch.float16)
    found = attention_gradient(graph, trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    kernels = [AttentionGradientKernel(found, "attention", form, contiguous=True) for form in GRADIENT_FORMS]
    texts = [one.source().rpartition("\n\n\n")[2].rstrip("\n") for one in kernels]
    golden("kernel_attention_gradients", "\n\n\n".join(texts))  # type: ignore[operator]


def test_text_of_the_gradients_of_wide_heads(golden: object) -> None:
    graph = form_graph("wide_attention", torch.float16)
    found = attention_gradient(graph, trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    kernels = [AttentionGradientKernel(found, "attention", form, contiguous=True) for form in WIDE_FORMS[1:3]]
    texts = [one.source().rpartition("\n\n\n")[2].rstrip("\n") for one in kernels]
    golden("kernel_wide_attention_gradients", "\n\n\n".join(texts))  # type: ignore[operator]


def test_text_of_the_gradient_of_a_bias(golden: object) -> None:
    graph = form_graph("position_bias_attention", torch.float16)
    found = attention_gradient(graph, trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    (bias,) = biases_of(found.region)
    one = bias_gradient(graph, found, bias)
    kernels = [BiasGradientKernel(one, "attention", form, contiguous=True) for form in BIAS_FORMS[1:]]
    texts = [kernel.source().rpartition("\n\n\n")[2].rstrip("\n") for kernel in kernels]
    golden("kernel_bias_gradient", "\n\n\n".join(texts))  # type: ignore[operator]


def test_attention_rounds_once() -> None:
    with pytest.raises(FusionError, match="kernel: attention in one pass rounds what it gives, not each of its nodes"):
        kernel_of(form_graph("causal_attention", torch.float16), rounding="eager")


def test_what_is_no_kernel_is_told() -> None:
    graph = Graph("g")
    build = Builder(graph)
    graph.outputs = [build.relu(build.input("x", (4, 5), torch.int64))]
    with pytest.raises(FusionError, match="kernel: kernels compute in half and single precision, relu is i64"):
        kernel_of(graph)
    with pytest.raises(FusionError, match="cannot be called '2 kernels'"):
        kernel_of(form_graph("swiglu", torch.float32), "2 kernels")
    with pytest.raises(FusionError, match="kernel kernel is pointwise, not looped"):
        kernel_of(form_graph("swiglu", torch.float32)).source("looped")


def test_more_rows_than_a_kernel_counts_are_told() -> None:
    """Joint indices are taken apart in 32 bits; a loop for itself may be longer."""
    kernel = kernel_of(form_graph("causal_attention", torch.float16))
    sizes = {dim: int(dim.size) for dim in kernel.region.loops}
    *_, heads, rows = (loop.dims[0] for loop in kernel.source().loops.rows)
    sizes[rows] = 2**31 // sizes[heads]
    with pytest.raises(FusionError, match="kernel: 2 x 1073741824 indices along one side of its tiles, 2147483647 at"):
        launch_of(kernel.source(), sizes, None)
    sizes[heads], sizes[rows] = 1, 2**31 - 1
    assert launch_of(kernel.source(), sizes, None).programs


@pytest.mark.skipif(HAS_TRITON, reason="Triton is installed")
def test_without_triton_it_is_told_what_to_install() -> None:
    with pytest.raises(FusionError, match=r"pip install 'regauge\[triton\]'"):
        kernel_of(form_graph("swiglu", torch.float32)).source().function()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "form"), [("swiglu", "pointwise"), ("add_rms_norm", "rows"), ("softmax", "looped")])
def test_kernels_compile_without_a_gpu_and_spill_nothing(name: str, form: Form, architecture: str) -> None:
    kernel = kernel_of(form_graph(name, torch.bfloat16, 4096, 4096), name)
    sizes = {dim: int(dim.size) for dim in kernel.region.loops}
    compiled = compile_kernel(kernel.source(form), sizes, architecture)
    assert compiled.binary[:4] == b"\x7fELF" and str(HERE).encode() not in compiled.binary
    assert compiled.spilled == 0 and compiled.registers <= 64


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "name",
    [
        "add_norm_quantize_float8",
        "silu_mul_quantize_float8",
        "add_norm_quantize_rows_float8",
        "silu_mul_quantize_rows_float8",
    ],
)
def test_rounding_to_floats_of_8_bits_compiles_for_all_and_spills_nothing(name: str, architecture: str) -> None:
    kernel = kernel_of(form_graph(name, torch.bfloat16, 4096, 4096), name)
    sizes = {dim: int(dim.size) for dim in kernel.region.loops}
    for form in kernel.forms:
        compiled = compile_kernel(kernel.source(form), sizes, architecture)
        assert compiled.spilled == 0 and compiled.registers <= 80


PRODUCTS = [
    ("int4_weight", 16),
    ("int4_weight", 4096),
    ("float8_both", 4096),
    ("float8_pair", 16),
    ("float8_groups", 4096),
    ("sparse_24_weight", 16),
    ("int4_neighbours", 16),
    ("bitmap_weight", 16),
    ("bitmap_weight", 4096),
    ("bitmap_of_codes", 4096),
    ("dense_in_heads", 16),
    ("grouped_queries", 1024),
    ("grouped_queries_int8", 16),
]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("name", "rows"), PRODUCTS)
def test_products_compile_and_spill_nothing(name: str, rows: int, architecture: str) -> None:
    kernel = kernel_of(form_graph(name, torch.bfloat16, rows, 4096), name)
    sizes = {dim: int(dim.size) for dim in kernel.region.sized}
    source = kernel.source("split" if rows == 16 else "contraction")
    parts = {"sparse_24_weight": 2, "grouped_queries_int8": 2, "dense_in_heads": 2}.get(name, 4)
    assert source.kernels == ((name, f"{name}_total") if rows == 16 else (name,))
    for one in source.kernels:
        compiled = compile_kernel(source, sizes, architecture, name=one)
        assert compiled.spilled == 0
        assert compiled.build.launch.parts == (parts if rows == 16 else 1)
        native = compiled.build.launch.constants.get("FLOAT8")
        assert native == (architecture == "sm_90" if name.startswith("float8") else None)


def test_text_of_a_gated_layer_of_four_bits(golden: object) -> None:
    kernel = kernel_of(form_graph("gate_and_up_int4", torch.bfloat16), "gate_and_up_int4")
    golden("kernel_gate_and_up_int4", kernel.source().text)  # type: ignore[operator]


def test_text_of_a_sparse_product(golden: object) -> None:
    kernel = kernel_of(form_graph("sparse_24_weight", torch.bfloat16, 16, 256), "sparse")
    golden("kernel_sparse_24", kernel.source().text.strip())  # type: ignore[operator]


def test_text_of_a_product_with_a_bitmap(golden: object) -> None:
    kernel = kernel_of(form_graph("bitmap_weight", torch.bfloat16, 16, 256), "bitmap")
    golden("kernel_bitmap", kernel.source().text.strip())  # type: ignore[operator]


def test_text_of_a_product_that_is_shared_out(golden: object) -> None:
    kernel = kernel_of(form_graph("int8_both", torch.float16), "int8_both")
    golden("kernel_int8_both_split", kernel.source("split").text)  # type: ignore[operator]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_attention_spills_nothing(architecture: str) -> None:
    kernel = kernel_of(form_graph("causal_attention", torch.bfloat16, 4096, 4096), "attention")
    sizes = {dim: int(dim.size) for dim in kernel.region.loops}
    split = kernel.source("split")
    for source in (kernel.source(), split, split.then):
        assert source is not None
        assert compile_kernel(source, sizes, architecture).spilled == 0


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["latent_values_attention", "latent_pair_attention"])
def test_attention_with_values_of_latents_spills_nothing(name: str, architecture: str) -> None:
    kernel = kernel_of(form_graph(name, torch.bfloat16, 16, 4096), name)
    sizes = {dim: int(dim.size) for dim in kernel.region.sized}
    for form in kernel.forms:
        assert compile_kernel(kernel.source(form), sizes, architecture).spilled == 0


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_codes_in_groups_leave_registers(architecture: str) -> None:
    kernel = kernel_of(form_graph("int4_groups_attention", torch.bfloat16, 4096, 4096), "attention")
    sizes = {dim: int(dim.size) for dim in kernel.region.sized}
    for form in kernel.forms:
        compiled = compile_kernel(kernel.source(form), sizes, architecture)
        assert compiled.spilled == 0 and compiled.registers <= (128 if architecture == "sm_90" else 216)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_a_binary_is_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernel_of(form_graph("swiglu", torch.float16, 64, 64), "swiglu")
    sizes = {dim: int(dim.size) for dim in kernel.region.loops}
    binaries = []
    for cache in ("first", "second"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / cache))
        binaries.append(compile_kernel(kernel.source(), sizes, "sm_80").binary)
    assert binaries[0] == binaries[1]


def test_an_unknown_architecture_is_told() -> None:
    kernel = kernel_of(form_graph("swiglu", torch.float16))
    with pytest.raises(FusionError, match="no architecture 'sm_1': give sm_80 or sm_90"):
        compile_kernel(kernel.source(), {}, "sm_1")


def test_text_of_many_nodes_that_read_twice_takes_no_longer_for_their_paths() -> None:
    """silu reads its operand twice: of 40 there are 2^40 paths."""
    graph = Graph("chain")
    build = Builder(graph)
    x = build.input("x", (4, 8), torch.float32)
    for _ in range(40):
        x = build.silu(x)
    graph.outputs = [x]
    assert kernel_of(graph).source().text.count("sigmoid(") == 40


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("dtype", ROUNDED_8, ids=str)
def test_floats_of_8_bits_compile_where_a_gpu_has_none(dtype: torch.dtype) -> None:
    graph = Graph("floats")
    build = Builder(graph)
    x = build.cast(build.input("x", (64, 512), dtype), dtype=torch.float32)
    graph.outputs = [build.quantize(build.silu(x), build.parameter("s", torch.tensor(0.5)), dtype=dtype)]
    kernel = kernel_of(graph)
    sizes = {dim: int(dim.size) for dim in kernel.region.sized}
    assert compile_kernel(kernel.source(), sizes, "sm_80").spilled == 0


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("name", ["turned_latents_attention", "latent_keys_with_bias_attention"])
def test_keys_of_latents_in_single_precision_spill_nothing(name: str) -> None:
    graph = form_graph(name, torch.float32, 16, 512)
    kernel = triton_kernel(trace(graph.nodes, graph.outputs), name)  # type: ignore[arg-type]
    sizes = {dim: int(dim.size) for dim in kernel.region.sized}
    for architecture in ("sm_80", "sm_90"):
        compiled = compile_kernel(kernel.source(), sizes, architecture)
        assert compiled.spilled == 0 and compiled.registers <= 224
