"""Modules whose regions are operators of torch: here they run the region in torch, on a GPU its kernel."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from decoder_block import decoder_block
from kernel_contract import drawn, evaluated
from random_graphs import graphs
from regauge.backends.torch_kernels import WithKernels, with_kernels
from regauge.backends.torch_runtime import source_of
from regauge.ir.edit import Builder
from regauge.ir.errors import EmitError
from regauge.ir.fusion import legality
from regauge.ir.graph import Graph
from regauge.ir.sample_inputs import sample_inputs
from regauge.ir.sizes import symbol


def gated(rows: Any = 5) -> Graph:
    """Two layers behind one norm, with a gate, a residual and the norm of that."""
    graph = Graph("gated")
    build = Builder(graph)
    generator = torch.Generator().manual_seed(0)
    x = build.input("x", (rows, 16), torch.float32)
    weights = [build.parameter(name, torch.randn(16, 16, generator=generator)) for name in ("gate", "up", "down")]
    scale = build.parameter("norm.weight", torch.ones(16))
    gate, up = (build.linear(x, weight) for weight in weights[:2])
    y = build.add(x, build.linear(build.mul(build.silu(gate), up), weights[2]))
    graph.outputs = [build.rms_norm(y, scale, normalized_shape=(16,), eps=1e-5), y]
    return graph


def names(found: WithKernels) -> list[str]:
    return [operator.name.rpartition("_")[0] for operator in found.operators]


def test_regions_become_operators_and_the_module_computes_the_same() -> None:
    graph = gated()
    found = with_kernels(graph)
    assert names(found) == ["silu_mul", "add_rms_norm"] and not found.left
    x = torch.randn(5, 16)
    torch.testing.assert_close(graph.to_torch(kernels="triton")(x), graph.to_torch()(x))
    source = source_of(found.graph.to_torch())
    assert source.count("torch.ops.regauge_kernels.") == 2 and "F.silu" not in source
    assert len(graph) == 7  # the graph itself stays


def test_unknown_kernels_are_told() -> None:
    with pytest.raises(EmitError, match="there are no kernels 'cuda': give 'triton', or None"):
        gated().to_torch(kernels="cuda")  # type: ignore[arg-type]


def test_the_same_region_elsewhere_is_the_same_operator() -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (5, 16), torch.float32)
    for name in "abc":
        x = build.linear(build.mul(build.silu(x), x), build.parameter(name, torch.zeros(16, 16)))
    graph.outputs = [x]
    found = with_kernels(graph)
    first, *others = found.operators  # it reads x, the others what a layer gives
    assert names(found) == ["silu_mul"] * 3 and {operator.name for operator in others} == {others[0].name}
    assert first.name != others[0].name


def test_attention_is_one_operator_with_the_rotary_codes_of_queries_and_keys() -> None:
    block = decoder_block(tokens=16, width=32, hidden=48)
    found = with_kernels(block)
    assert names(found) == ["neg_concat_mul_add_matmul_softmax", "add_rms_norm", "silu_mul"]
    assert len(found.operators[0].reads) == 9 and len(found.operators[0].writes) == 1
    inputs = [torch.randn(2, 16, 32).half(), torch.randn(16, 8).half(), torch.randn(16, 8).half()]
    torch.testing.assert_close(found.graph.to_torch()(*inputs), block.to_torch()(*inputs))


def test_a_region_may_read_what_another_one_gives() -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (64, 32), torch.float32)
    y = build.softmax(build.mul(x, 0.5), dim=1)
    normed = build.tanh(build.layer_norm(y, normalized_shape=(32,)))
    graph.outputs = [normed, build.sigmoid(build.softmax(build.neg(y), dim=0))]
    found = with_kernels(graph)
    assert len(found.operators) == 2 and not found.left
    x_tensor = torch.randn(64, 32)
    for own, other in zip(found.graph.to_torch()(x_tensor), graph.to_torch()(x_tensor), strict=True):
        torch.testing.assert_close(own, other)


def test_products_are_left_to_the_library_but_for_those_of_attention() -> None:
    found = with_kernels(decoder_block(tokens=16, width=32, hidden=48))
    ops = [node.op for node in found.graph.nodes]
    assert ops.count("linear") == 7 and ops.count("matmul") == 0
    rounded = with_kernels(decoder_block(tokens=16, width=32, hidden=48), rounding="eager")
    assert names(rounded) == ["neg_concat_mul_add", "mul_softmax", "add_rms_norm", "silu_mul"] and not rounded.left
    assert len(rounded.operators[0].reads) == 8 and len(rounded.operators[0].writes) == 2


def test_attention_by_itself_is_an_operator_and_has_gradients() -> None:
    graph = Graph("g")
    build = Builder(graph)
    q, k, v = (build.input(name, (2, heads, 5, 8), torch.float32) for name, heads in (("q", 4), ("k", 2), ("v", 2)))
    graph.outputs = [build.attention(q, k, v, scale=0.3, is_causal=True, enable_gqa=True)]
    (operator,) = with_kernels(graph).operators
    assert operator.kernel.region.kind == "attention" and operator.name.startswith("attention_")
    arguments = [torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (4, 2, 2)]
    torch.library.opcheck(getattr(torch.ops.regauge_kernels, operator.name).default, arguments)


def test_gradients_go_through_and_torch_finds_no_fault() -> None:
    graph = gated()
    module, plain = graph.to_torch(kernels="triton"), graph.to_torch()
    for one in (module, plain):
        x = torch.ones(5, 16, requires_grad=True)
        normed, stream = one(x)
        (normed.sin().sum() + stream.square().sum()).backward()
    for (name, own), (_, other) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=name)
    for operator in with_kernels(graph).operators:
        arguments = [torch.randn([int(size) for size in value.shape], requires_grad=True) for value in operator.reads]
        torch.library.opcheck(getattr(torch.ops.regauge_kernels, operator.name).default, arguments)


def test_sizes_may_be_dynamic_and_the_module_can_be_exported() -> None:
    rows = symbol("rows")
    graph = gated(rows)
    graph.symbols[rows] = (2, None)
    module = graph.to_torch(kernels="triton").eval()
    x = torch.randn(3, 16)
    torch.testing.assert_close(module(x), graph.to_torch()(x))
    exported = torch.export.export(module, (x,), dynamic_shapes=[{0: torch.export.Dim("rows", min=2)}])
    longer = torch.randn(7, 16)
    torch.testing.assert_close(exported.module()(longer), module(longer))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("regauge_kernels" in target for target in targets) == 2


def test_what_a_node_gives_may_be_rounded_each_time() -> None:
    found = with_kernels(gated(), rounding="eager")
    assert all("rounding  eager" in operator.kernel.source().text for operator in found.operators)
    fused = {operator.name for operator in with_kernels(gated()).operators}
    assert not fused & {operator.name for operator in found.operators}


@hypothesis_settings(max_examples=15)
@given(graphs())
def test_random_graphs_compute_the_same(graph: Graph) -> None:
    check_random(graph)


@pytest.mark.nightly
@hypothesis_settings(max_examples=500)
@given(graphs())
def test_many_random_graphs_compute_the_same(graph: Graph) -> None:
    check_random(graph)


def check_random(graph: Graph) -> None:
    """In double precision, of which there would be no kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(legality, "FLOATS", (torch.float64,))
        found = with_kernels(graph)
    assert not found.left
    inputs = sample_inputs(graph, seed=1)
    for own, other in zip(found.graph.run(inputs), graph.run(inputs), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_kernels_run() -> None:
    graph = gated()
    module = graph.to_torch(kernels="triton").cuda()
    tensors = drawn(graph)
    true = evaluated(graph, tensors, torch.float64)
    with torch.no_grad():
        found = module(tensors[graph.inputs[0]].cuda())
    for value, result in zip(graph.outputs, found, strict=True):
        torch.testing.assert_close(result.cpu().double(), true[value], rtol=1e-4, atol=1e-4)  # type: ignore[index]
