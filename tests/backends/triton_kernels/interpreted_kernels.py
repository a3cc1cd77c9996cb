"""Kernels in Triton's interpreter: test_kernel.py runs these tests in a process of their own."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import triton_interpreter
from decoder_block import decoder_block
from kernel_contract import check_kernel, drawn, evaluated
from kernel_forms import FORMS, form_graph
from quantized_graphs import quantized, random_tensor
from random_regions import DTYPES, attentions, few_bit_products, products, regions, streams, windows
from regauge.backends.torch_module.kernels import with_kernels
from regauge.backends.triton_kernels import kernel as kernels
from regauge.backends.triton_kernels.configs import Config
from regauge.backends.triton_kernels.kernel import Form, launch_of, triton_kernel
from regauge.backends.triton_kernels.loops import sizes_of
from regauge.backends.triton_kernels.source import Rounding
from regauge.ir.edit import Builder
from regauge.ir.errors import FusionError
from regauge.ir.fusion.plan import plan_fusion
from regauge.ir.fusion.region import Region
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph
from regauge.ir.scalars import ROUNDED_8
from regauge.ir.sizes.expressions import symbol

triton_interpreter.repair()

ROUNDINGS: tuple[Rounding, ...] = ("fused", "eager")


# By day float32 and one of the shorter types in turn, bfloat16 in the way that rounds each node; at night all ways.
SHORT = [(torch.float16, "fused", False), (torch.bfloat16, "eager", True)]
EVERY = [(dtype, *way) for dtype in DTYPES for way in (("fused", False), ("eager", True))]


def _ways(place: int, name: str) -> list[Any]:
    by_day = [(torch.float32, "fused", False), SHORT[place % 2]]
    return [pytest.param(name, *way, marks=[] if way in by_day else [pytest.mark.nightly]) for way in EVERY]


@pytest.mark.parametrize(
    ("name", "dtype", "rounding", "spread"), [one for place, name in enumerate(FORMS) for one in _ways(place, name)]
)
def test_form_keeps_the_contract(name: str, dtype: torch.dtype, rounding: Rounding, spread: bool) -> None:
    graph = form_graph(name, dtype)
    kernel = triton_kernel(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    for form in kernel.forms:
        check_kernel(graph, drawn(graph, spread=spread), _possible(rounding, kernel.region), form)


def _possible(rounding: Rounding, region: Region) -> Rounding:
    return "fused" if region.kind == "attention" else rounding


def every_region() -> st.SearchStrategy[Graph]:
    return regions() | products() | windows() | few_bit_products() | attentions()


def check_random(graph: Graph, rounding: Rounding, seed: int) -> None:
    kernel = triton_kernel(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    rounding = _possible(rounding, kernel.region)
    for form in kernel.forms:
        check_kernel(graph, drawn(graph, seed=seed, spread=bool(seed % 2)), rounding, form)


@hypothesis_settings(max_examples=40)
@given(regions() | products() | windows(), st.sampled_from(ROUNDINGS), st.integers(0, 99))
def test_random_regions_keep_the_contract(graph: Graph, rounding: Rounding, seed: int) -> None:
    check_random(graph, rounding, seed)


@hypothesis_settings(max_examples=10)
@given(attentions(), st.integers(0, 99))
def test_random_attention_keeps_the_contract(graph: Graph, seed: int) -> None:
    check_random(graph, "fused", seed)


@hypothesis_settings(max_examples=20)
@given(streams(), st.sampled_from(ROUNDINGS), st.integers(0, 99))
def test_random_streams_beside_one_another_keep_the_contract(graph: Graph, rounding: Rounding, seed: int) -> None:
    (region,) = plan_fusion(graph).regions
    for form in triton_kernel(region).forms:
        check_kernel(graph, drawn(graph, seed=seed, spread=bool(seed % 2)), rounding, form, region)


@hypothesis_settings(max_examples=15)
@given(few_bit_products(), st.sampled_from(ROUNDINGS), st.integers(0, 99))
def test_random_products_of_few_bits_keep_the_contract(graph: Graph, rounding: Rounding, seed: int) -> None:
    check_random(graph, rounding, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["float8_pair", "float8_groups", "float8_both"])
def test_floats_of_8_bits_are_multiplied_as_such(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "architecture_of", lambda _: "sm_90")
    graph = form_graph(name, dtype)
    check_kernel(graph, drawn(graph), form="contraction")


def _around(dtype: torch.dtype) -> torch.Tensor:
    """All floats of 8 bits, what is half way between two and right beside that, beyond them, and all of bfloat16."""
    own = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    ends = own[own.isfinite()].sort().values
    half = torch.cat([(ends[1:] + ends[:-1]) / 2, ends[-1:] + (ends[-1] - ends[-2]) / 2])
    half = torch.cat([half, -half])
    beside = [torch.nextafter(half, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    all_ = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    return torch.cat([own, half, *beside, all_, torch.tensor([480.0, 464.00003, 61440.0, 65536.0, 1e-45])])


@pytest.mark.parametrize("op", ["cast", "quantize", "read back"])
@pytest.mark.parametrize("dtype", ROUNDED_8, ids=str)
def test_floats_of_8_bits_are_rounded_as_by_torch(dtype: torch.dtype, op: str) -> None:
    """Each bit, of numbers of every kind; what is read back in the same kernel is rounded, too."""
    numbers = _around(dtype)
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (len(numbers),), torch.float32)
    if op == "quantize":
        found = build.quantize(x, build.parameter("s", torch.tensor(0.75)), dtype=dtype)
    else:
        found = build.cast(x, dtype=dtype)
    graph.outputs = [build.mul(build.cast(found, dtype=torch.float32), 3.0)] if op == "read back" else [found]
    region = trace(graph.nodes, graph.outputs)  # type: ignore[arg-type]
    read = {load.value.value: getattr(load.value.value, "tensor", numbers) for load in region.loads}
    (own,) = triton_kernel(region).launch(read).values()
    (expected,) = graph.run(numbers)
    bits = torch.uint8 if op != "read back" else torch.int32
    same = own.view(bits) == expected.view(bits)
    either = own.float().isnan() & expected.float().isnan()  # the sign of what is no number is nobody's
    assert bool((same | either).all()), numbers[~(same | either)][:9]


@pytest.mark.parametrize("form", ["rows", "looped"])
@pytest.mark.parametrize("dtype", ROUNDED_8, ids=str)
def test_rows_of_floats_of_8_bits_are_rounded_as_by_torch(dtype: torch.dtype, form: Form) -> None:
    """Each bit of scales and codes, where the greatest entry is next to a power of two, nothing, or tiny."""
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (200, 37), torch.float32)
    scales = build.row_scales(x, dtype=dtype)
    graph.outputs = [build.row_codes(x, scales, dtype=dtype), scales]
    ends = torch.finfo(dtype).max * torch.exp2(torch.arange(-30.0, 20.0))
    beside = [torch.nextafter(ends, torch.tensor(end)) for end in (0.0, torch.inf)]
    numbers = (torch.rand(200, 37) - 0.5) * torch.cat([ends, *beside, 3 * ends])[:, None]
    numbers[:, 20] = torch.cat([ends, *beside, 3 * ends])
    numbers[7], numbers[8, 3] = 0.0, float("nan")
    region = trace(graph.nodes, graph.outputs)  # type: ignore[arg-type]
    own = triton_kernel(region).launch({x: numbers}, form)
    for value, expected in zip(graph.outputs, graph.run(numbers), strict=True):
        found, expected = own[value].float(), expected.float()  # type: ignore[index]
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)), value


@pytest.mark.parametrize("scheme", ["w4", "w3", "w8", "w8a8", "fp8", "fp8,activations=dynamic", "e4m3fnuz", "e5m2fnuz"])
def test_a_quantized_module_has_kernels_of_its_products(scheme: str) -> None:
    for operator in with_kernels(quantized(scheme)).operators:
        tensors = [random_tensor(value) for value in operator.reads]
        for own, other in zip(*(_tuple(run(*tensors)) for run in (operator.launch, operator.body)), strict=True):
            assert own.dtype == other.dtype
            own, other = own.float(), other.float()
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def _tuple(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def test_programs_that_share_a_tile_give_the_same_sums_each_time() -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (3, 1024), torch.float16)
    q = build.parameter("q", torch.randint(-127, 128, (40, 1024)).to(torch.int8), trainable=False)
    w = build.dequantize(q, build.parameter("s", torch.rand(40, 8).half() / 64), axis=1, block_size=128)
    graph.outputs = [build.linear(x, w)]
    kernel = triton_kernel(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    tensors = drawn(graph)
    check_kernel(graph, tensors)
    first, second = (kernel.launch(tensors) for _ in range(2))
    assert all(torch.equal(first[value], second[value]) for value in first)
    assert [form for form, _ in kernel._sources] == ["contraction", "split"]


@pytest.mark.nightly
@hypothesis_settings(max_examples=1000)
@given(every_region(), st.sampled_from(ROUNDINGS), st.integers(0, 99))
def test_many_random_regions_keep_the_contract(graph: Graph, rounding: Rounding, seed: int) -> None:
    check_random(graph, rounding, seed)


@pytest.mark.parametrize("form", ["attention", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_latents_are_mixed_where_nothing_is_read_and_where_much_is(dtype: torch.dtype, form: Form) -> None:
    """A row without a key has no bias either; sums of large latents over many places stay within half precision."""
    graph = Graph("g")
    build = Builder(graph)
    q, k, latents = (build.input(n, s, dtype) for n, s in (("q", (3, 16)), ("k", (300, 16)), ("l", (300, 20))))
    mask = build.input("mask", (3, 300), torch.bool)
    weight, bias = build.parameter("w", torch.randn(24, 20).to(dtype)), build.parameter("b", torch.randn(24).to(dtype))
    graph.outputs = [build.attention(q, k, build.linear(latents, weight, bias), mask, scale=0.0)]
    tensors = dict(drawn(graph))
    tensors[latents] = 300 + 100 * tensors[latents]
    tensors[mask][:] = True
    tensors[mask][1] = False
    check_kernel(graph, tensors, form=form)
    (own,) = triton_kernel(trace(graph.nodes, graph.outputs)).launch(tensors, form).values()  # type: ignore[arg-type]
    assert not own[1].any() and bool(own.isfinite().all())


@pytest.mark.parametrize("form", ["attention", "split"])
@pytest.mark.parametrize("coded", ["k", "v"])
def test_a_byte_may_hold_all_numbers_of_a_head(form: Form, coded: str) -> None:
    """Bytes have no axis along a head then, and the tile of their digits is as wide as that of the other factor."""
    graph = Graph("g")
    build = Builder(graph)
    q = build.input("q", (1, 2, 3, 4), torch.float32)
    factors = {name: build.input(name, (1, 2, 5, 4), torch.float32) for name in "kv" if name != coded}
    stored = build.input("stored", (1, 2, 5, 1), torch.uint8)
    factors[coded] = build.mul(build.cast(build.unpack(stored, base=4, count=4), dtype=torch.float32), 0.5)
    scores = build.div(build.matmul(q, build.permute(factors["k"], dims=(0, 1, 3, 2))), 3.0)
    graph.outputs = [build.matmul(build.softmax(scores, dim=3), factors["v"])]
    check_kernel(graph, drawn(graph), form=form)


def test_few_queries_share_out_the_keys_among_programs() -> None:
    graph = Graph("g")
    build = Builder(graph)
    length = symbol("length")
    q, k, v = (
        build.input(name, (1, 2, size, 16), torch.float32) for name, size in (("q", 1), ("k", length), ("v", length))
    )
    graph.outputs = [build.attention(q, k, v, scale=0.25)]
    kernel = triton_kernel(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    for size in (100, 1100):
        tensors = drawn(graph, {length: size})
        (found,) = kernel.launch(tensors).values()
        torch.testing.assert_close(found, evaluated(graph, tensors)[graph.outputs[0]])  # type: ignore[index]
    assert [form for form, _ in kernel._sources] == ["attention", "split"]
    sizes = sizes_of(kernel.region, kernel.source().reads, tensors)
    assert launch_of(kernel.source("split"), sizes, None).constants["SPLITS"] == 4


def test_one_kernel_serves_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = symbol("rows"), symbol("columns")
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (rows, columns), torch.float32)
    graph.outputs = [build.softmax(build.mul(x, 2.0), dim=1)]
    kernel = triton_kernel(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    monkeypatch.setattr(kernels, "PERSISTENT", 64)
    for shape in ((1, 1), (3, 64), (2, 65), (0, 5)):
        given_tensor = torch.randn(shape)
        (found,) = kernel.launch({x: given_tensor}).values()
        torch.testing.assert_close(found, torch.softmax(2 * given_tensor, 1))
    assert {form for form, _ in kernel._sources} == {"rows", "looped"}


def test_places_follow_from_sizes_that_are_known_when_it_runs() -> None:
    """Segments, a flip and windows with padding, of a batch and a length that are symbols."""
    batch, length = symbol("batch"), symbol("length")
    graph = Graph("g")
    build = Builder(graph)
    x, y = (build.input(name, (batch, 4, length), torch.float32) for name in "xy")
    weight = build.parameter("w", torch.randn(4, 1, 3))
    both = build.flip(build.concat(build.relu(x), y, dim=2), dims=(0,))
    options = {"stride": (2,), "padding": (1,), "dilation": (1,), "groups": 4}
    graph.outputs = [build.silu(build.conv(both, weight, **options))]
    kernel = triton_kernel(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    for shape in ((2, 4, 5), (3, 4, 8), (1, 4, 1)):
        tensors = {x: torch.randn(shape), y: torch.randn(shape), weight: weight.tensor}
        (found,) = kernel.launch(tensors).values()
        torch.testing.assert_close(found, evaluated(graph, tensors)[graph.outputs[0]])  # type: ignore[index]


def test_what_an_operator_launches_is_what_it_computes_in_torch() -> None:
    for operator in with_kernels(decoder_block(tokens=8, width=16, heads=2, hidden=24, dtype=torch.float32)).operators:
        tensors = [torch.randn([int(size) for size in value.shape]) for value in operator.reads]
        torch.testing.assert_close(operator.launch(*tensors), operator.body(*tensors))


@pytest.mark.parametrize("op", ["rms_norm", "softmax", "silu"])
def test_one_kernel_computes_what_stands_beside_one_another(op: str) -> None:
    graph = Graph("g")
    build = Builder(graph)
    inputs = [build.input("x", (3, 2, 33), torch.float32), build.input("y", (2, 3, 33), torch.float32)]
    inputs[1] = build.permute(inputs[1], dims=(1, 0, 2))
    options = {"rms_norm": {"normalized_shape": (33,), "eps": 1e-6}, "softmax": {"dim": 2}}.get(op, {})
    graph.outputs = [build.mul(build(op, build.mul(x, 0.5), **options), 2.0) for x in inputs]
    (operator,) = with_kernels(graph).operators
    tensors = [torch.randn([int(size) for size in value.shape]) for value in operator.reads]
    for own, other in zip(operator.launch(*tensors), operator.body(*tensors), strict=True):
        torch.testing.assert_close(own, other)


def test_shapes_that_do_not_fit_are_told() -> None:
    graph = form_graph("broadcast", torch.float32)
    tensors = dict(drawn(graph))
    tensors[graph.inputs[0]] = tensors[graph.inputs[0]][:, :, 1:]
    kernel = triton_kernel(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    with pytest.raises(FusionError, match="x has 36 indices where its kernel expects 37"):
        kernel.launch(tensors)
    tensors[graph.inputs[0]] = tensors[graph.inputs[0]][0]
    with pytest.raises(FusionError, match="x has 2 axes where its kernel expects 3"):
        kernel.launch(tensors)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_looped_softmax_meets_greater_numbers_tile_after_tile(
    dtype: torch.dtype, rounding: Rounding, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.mul(build.input("x", (6, 50), dtype), 3.0)
    below = build.sub(x, build.amax(x, dims=(1,), keepdim=True))
    power = build.exp(below)
    written_out = build.div(power, build.sum(power, dims=(1,), keepdim=True))
    logs = build.logsumexp(x, dims=(1,))
    graph.outputs = [build.softmax(x, dim=1), build.log_softmax(x, dim=1), logs, written_out]
    monkeypatch.setattr(kernels, "config_for", lambda *_: Config({"ENTRIES": 8}, warps=4, stages=2))
    tensor = torch.randn(6, 50).to(dtype)
    tensor[0, :40], tensor[1, 30:] = float("-inf"), float("-inf")
    tensor[2, 40], tensor[3, 3], tensor[4, 49] = float("nan"), float("inf"), 50.0
    tensor[5] = torch.linspace(-20, 20, 50).to(dtype)
    check_kernel(graph, {graph.inputs[0]: tensor}, rounding, "looped")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_of_many_classes_is_found_in_one_pass(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels in the first tile, in the last, of classes that cannot be, of none, and ignored ones."""
    graph = Graph("g")
    build = Builder(graph)
    x, target = build.input("x", (7, 50), dtype), build.input("target", (7,), torch.int64)
    graph.outputs = [build.cross_entropy(x, target)]
    monkeypatch.setattr(kernels, "config_for", lambda *_: Config({"ENTRIES": 8}, warps=4, stages=2))
    logits = 20 * torch.randn(7, 50)
    logits[0, :40], logits[3, 17], logits[5, 30] = float("-inf"), float("nan"), 200.0
    labels = torch.tensor([49, 0, -100, 5, 12, 30, 17])
    check_kernel(graph, {x: logits.to(dtype), target: labels}, form="looped")
    text = triton_kernel(trace(graph.nodes, graph.outputs)).source("looped").text  # type: ignore[arg-type]
    assert text.count("for start in range") == 1 and "target == -100" in text
