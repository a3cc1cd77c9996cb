"""Modules whose regions are operators of torch: here they run the region in torch, on a GPU its kernel."""

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from safetensors.torch import load_file

import regauge
from decoder_block import decoder_block
from kernel_contract import drawn, evaluated
from quantized_graphs import gated_layer, quantized, random_tensor
from random_graphs import graphs
from regauge.backends.torch_module.kernels import WithKernels, with_kernels
from regauge.backends.torch_module.runtime import source_of
from regauge.ir.edit import Builder
from regauge.ir.errors import EmitError
from regauge.ir.fusion import legality
from regauge.ir.fusion.fused import body_of, fused_nodes
from regauge.ir.graph import Graph
from regauge.ir.running.sample_inputs import sample_inputs
from regauge.ir.sizes.expressions import symbol
from regauge.optimize import optimize
from small_graphs import gated_layers


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
    assert len(graph) == 7  # the graph itself stays


FUNCTIONS = """
def silu_mul(linear, linear_1):
    linear = F.silu(linear)
    return linear * linear_1


def add_rms_norm(x, linear, weight):
    x = x + linear
    rms_norm = F.rms_norm(x, (16,), weight, eps=1e-05)
    return x, rms_norm
"""

DECORATED = """
@kernel(\"\"\"
graph silu_mul(%linear: f32[5,16], %linear_1: f32[5,16]) {
  %silu = silu(%linear): f32[5,16]
  %mul = mul(%silu, %linear_1): f32[5,16]
  return %mul
}
\"\"\")
def silu_mul(linear, linear_1):
"""


def test_regions_are_functions_in_the_source() -> None:
    graph = regauge.optimize(gated(), "fuse")
    plain, kernels = (source_of(graph.to_torch(kernels=kind)) for kind in (None, "triton"))  # type: ignore[arg-type]
    assert FUNCTIONS in plain and "regauge" not in plain.partition("import torch")[2]
    assert DECORATED in kernels and kernels.count("@kernel") == 2
    eager = regauge.optimize(gated(), "fuse{rounding=eager}").to_torch(kernels="triton")
    assert source_of(eager).count('""", rounding="eager")') == 2


def test_what_has_no_kernel_is_a_function_only() -> None:
    graph = regauge.optimize(gated(), "fuse")
    (silu,) = (node for node in fused_nodes(graph) if body_of(node).name == "silu_mul")
    for value in (*silu.regions[0].inputs, *(value for node in silu.regions[0].nodes for value in node.outputs)):
        value.dtype = torch.float64
    assert source_of(graph.to_torch(kernels="triton")).count("@kernel") == 1
    reason = "kernels compute in half and single precision, silu is f64: convert the model, .float() or .half()"
    assert with_kernels(graph).left == (f"silu_mul: {reason}",)


WITHOUT = """
import sys, torch
sys.modules["regauge"] = None
import model
x, *wanted = torch.load("values.pt")
torch.testing.assert_close(list(model.load()(x)), wanted)
"""


def test_a_saved_module_runs_without_regauge(tmp_path: Path) -> None:
    graph = gated()
    x = torch.randn(5, 16)
    graph.write(tmp_path, kernels="triton")
    assert (tmp_path / "model.py").read_text().count("@kernel") == 2
    torch.save([x, *graph.run(x)], tmp_path / "values.pt")
    subprocess.run([sys.executable, "-c", WITHOUT], cwd=tmp_path, check=True)


def test_constants_of_a_saved_module_lie_where_its_source_reads_them(tmp_path: Path) -> None:
    """A region spans modules, so that it reads what one of them held at another place."""
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (5, 16), torch.float32)
    table = build.constant(torch.randn(5, 16), "table")
    build.scope = (("", "Model"), ("first", "First"))
    y = build.sub(build.mul(x, table), build.sigmoid(table))
    build.scope = (("", "Model"), ("second", "Second"))
    graph.outputs = [build.tanh(y)]
    graph.write(tmp_path, kernels="triton")
    stored = load_file(tmp_path / "model.safetensors")
    assert list(stored) == ["table"] and "self.table" in (tmp_path / "model.py").read_text()


def test_a_module_with_kernels_is_pickled() -> None:
    module = gated().to_torch(kernels="triton")
    x = torch.randn(5, 16)
    for own, other in zip(pickle.loads(pickle.dumps(module))(x), module(x), strict=True):
        assert torch.equal(own, other)


def test_a_module_with_kernels_compiles_whole() -> None:
    module = gated().to_torch(kernels="triton")
    x = torch.randn(5, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for own, other in zip(compiled(x), module(x), strict=True):
        torch.testing.assert_close(own, other)


def test_unknown_kernels_are_told() -> None:
    with pytest.raises(EmitError, match="there are no kernels 'cuda': give 'triton' or 'onednn', or None"):
        gated().to_torch(kernels="cuda")  # type: ignore[arg-type]


def test_the_same_region_elsewhere_is_the_same_operator() -> None:
    found = with_kernels(gated_layers())
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


def test_windows_and_tables_are_in_operators_and_have_gradients() -> None:
    graph = Graph("g")
    build = Builder(graph)
    x, tokens = build.input("x", (2, 6, 8), torch.float32), build.input("tokens", (2, 6), torch.int64)
    kernel, table = (build.parameter(name, torch.randn(s)) for name, s in (("kernel", (6, 1, 3)), ("table", (9, 8))))
    y = build.conv(
        build.pad(x, pads=((0, 0), (0, 0), (2, 0))), kernel, stride=(1,), padding=(0,), dilation=(1,), groups=6
    )
    normed = build.layer_norm(build.embedding(table, tokens), normalized_shape=(8,))
    graph.outputs = [build.cumsum(build.silu(y), dim=1), build.cumsum(normed, dim=1)]
    found = with_kernels(graph)
    assert sorted(names(found)) == ["embedding_layer_norm", "pad_conv_silu"] and not found.left
    module, plain = found.graph.to_torch(), graph.to_torch()
    given = torch.randn(2, 6, 8), torch.randint(0, 9, (2, 6))
    for one in (module, plain):
        sum(result.square().sum() for result in one(*given)).backward()
    for (name, own), (_, other) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=name)


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


def test_products_of_few_bits_are_operators_and_codes_share_bytes() -> None:
    graph = quantized("w4")
    found = with_kernels(graph)
    assert names(found) == ["unpack_dequantize_linear_silu_mul", "unpack_dequantize_linear_add"] and not found.left
    packed = [value for value in found.graph.parameters.values() if value.name.endswith("_packed")]
    assert [value.shape for value in packed] == [(96, 2, 16), (96, 2, 16), (64, 3, 16)]
    x = torch.randn(4, 64)
    torch.testing.assert_close(graph.to_torch(kernels="triton")(x), graph.run(x)[0])


def test_numbers_made_of_codes_are_part_of_each_product_that_reads_them() -> None:
    graph = quantized("w8a8")
    found = with_kernels(graph)
    assert [len(operator.kernel.region.contractions) for operator in found.operators] == [0, 2, 1]
    assert [operator.writes[0].dtype for operator in found.operators] == [torch.int8, torch.int8, torch.float32]
    assert {node.op for node in found.graph.nodes} == {"fused"}  # what is quantized is so where it is computed
    x = torch.randn(4, 64)
    torch.testing.assert_close(graph.to_torch(kernels="triton")(x), graph.to_torch()(x), rtol=1e-4, atol=1e-4)


def test_of_many_rows_an_operator_gives_what_the_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = symbol("rows")
    graph = gated_layer(rows)
    graph.symbols[rows] = (1, None)
    graph = optimize(graph, "quantize{scheme=w8,target=torch-cuda}")
    first, *_ = with_kernels(graph).operators
    launched: list[int] = []
    monkeypatch.setattr(
        type(first.kernel), "launch", lambda kernel, given: launched.append(1) or dict.fromkeys(first.writes)
    )
    weights = [random_tensor(value) for value in first.reads if value.name != "x"]
    place = [value.name for value in first.reads].index("x")
    for count in (512, 513):
        tensors = [*weights[:place], torch.randn(count, 64), *weights[place:]]
        result = first.launch(*tensors)
    assert launched == [1] and torch.equal(result, first.body(*tensors))


def test_gradients_go_through_and_torch_finds_no_fault() -> None:
    graph = gated()
    module, plain = graph.to_torch(kernels="triton"), graph.to_torch()
    for one in (module, plain):
        x = torch.ones(5, 16, requires_grad=True)
        normed, stream = one(x)
        (normed.sin().sum() + stream.square().sum()).backward()
    for (name, own), (_, other) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        greatest = float(other.grad.abs().max())  # entries that cancel have the error of the greatest ones
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-5, atol=2e-6 * greatest, msg=name)
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
