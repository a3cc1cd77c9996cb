"""Gradients of operators with kernels: by operators of their own, by torch for the rest."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from decoder_block import decoder_block
from kernel_contract import drawn
from kernel_forms import form_graph
from regauge.backends.to_torch import to_torch
from regauge.backends.torch_module.kernels import KernelOperator, kernel_operator, with_kernels
from regauge.backends.triton_kernels.compile import compile_kernel
from regauge.backends.triton_kernels.kernel import Source
from regauge.ir.edit import Builder
from regauge.ir.fusion import legality
from regauge.ir.fusion.fuse import fuse
from regauge.ir.fusion.fused import body_of, canonical
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph, Value
from regauge.ir.sizes.expressions import symbol

HERE = Path(__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("when", ["by day", pytest.param("nightly", marks=pytest.mark.nightly)])
def test_interpreted_gradients(when: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_gradients.py")]
    command += ["-m", when] if when == "nightly" else []
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[2])
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


def block(dtype: torch.dtype, rows: object = 4) -> Graph:
    """A gated layer between two norms, with residuals."""
    graph = Graph("block")
    build = Builder(graph)
    generator = torch.Generator().manual_seed(0)
    x = build.input("x", (rows, 8), dtype)
    weights = [
        build.parameter(name, torch.randn(8, 8, generator=generator).to(dtype) / 3) for name in ("gate", "up", "down")
    ]
    norms = [build.parameter(f"norm{i}", torch.rand(8, generator=generator).to(dtype) + 0.5) for i in range(2)]
    h = build.rms_norm(build.add(x, build.tanh(x)), norms[0], normalized_shape=(8,), eps=1e-5)
    gate, up = (build.linear(h, weight) for weight in weights[:2])
    y = build.add(x, build.linear(build.mul(build.silu(gate), up), weights[2]))
    graph.outputs = [build.layer_norm(y, norms[1], normalized_shape=(8,)), y]
    return graph


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were kernels in double precision."""
    monkeypatch.setattr(legality, "FLOATS", (torch.float64,))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The operators whose bodies ran, by what they compute."""
    names: list[str] = []
    overload = KernelOperator.overload.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(
        KernelOperator, "overload", property(lambda made: names.append(made.graph.name) or overload(made))
    )
    yield names


def test_operators_compute_gradients_of_rows_and_of_what_rows_share(called: list[str]) -> None:
    module, plain = block(torch.float32).to_torch(kernels="triton"), block(torch.float32).to_torch()
    called.clear()
    found = []
    for one in (module, plain):
        x = torch.linspace(-1, 1, 32).reshape(4, 8).requires_grad_()
        normed, stream = one(x)
        (normed.sin().sum() + stream.square().sum()).backward()
        found.append([x.grad, *(parameter.grad for parameter in one.parameters())])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)
    assert called == ["add_layer_norm_gradient", "silu_mul_gradient", "tanh_add_rms_norm_gradient"]


def test_why_gradients_are_left_is_recorded() -> None:
    norm, gate, last = with_kernels(block(torch.float32)).operators
    assert not norm.gradients.left and not last.gradients.left
    assert not gate.gradients.left and [one.of for one, _ in gate.backward] == [((0,), (1,))]


def test_entries_of_tables_get_their_gradients_from_kernels(called: list[str]) -> None:
    """Tokens twice, one that is padding; positions, which rows share, are left to torch."""
    graph = Graph("embedded")
    build = Builder(graph)
    tokens = build.input("tokens", (2, 5), torch.int64)
    table, places = build.parameter("table", torch.randn(11, 8)), build.parameter("places", torch.randn(5, 8))
    gain = build.parameter("gain", torch.rand(8) + 0.5)
    h = build.add(build.embedding(table, tokens, padding_idx=3), places)
    graph.outputs = [build.rms_norm(h, gain, normalized_shape=(8,), eps=1e-5), h]
    (made,) = with_kernels(graph).operators
    assert set(made.gradients.left) == {"places"}
    assert [(one.table, one.numbers) for kernel, _ in made.backward for ones in kernel.entries for one in ones] == [
        (0, 1)
    ]
    found = []
    modules = graph.to_torch(kernels="triton"), graph.to_torch()
    called.clear()
    for module in modules:
        normed, stream = module(torch.tensor([[1, 2, 3, 1, 10], [1, 3, 0, 4, 2]]))
        (normed.sin().sum() + stream.square().sum()).backward()
        found.append([parameter.grad for parameter in module.parameters()])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)
    assert called == ["embedding_add_rms_norm_gradient"] and not found[0][0][3].any() and found[0][0][1].any()


def attention_block(dtype: torch.dtype, *, turned: bool) -> Graph:
    """Causal attention, two heads of queries for each of keys; with ``turned`` queries and keys are scaled before."""
    graph = Graph("attention")
    build = Builder(graph)
    q, k, v = (build.input(name, (1, heads, 6, 8), dtype) for name, heads in (("q", 4), ("k", 2), ("v", 2)))
    if turned:
        q, k = (build.mul(x, build.input(f"cos_{x.name}", (6, 8), dtype)) for x in (q, k))
    y = build.attention(q, k, v, scale=0.3, is_causal=True, enable_gqa=True)
    graph.outputs = [build.mul(y, build.sigmoid(build.input("gate", (1, 4, 6, 8), dtype))) if turned else y]
    return graph


@pytest.mark.parametrize("turned", [False, True])
def test_operators_compute_the_gradients_of_attention(called: list[str], turned: bool) -> None:
    """Also where more is fused with it: that is left to torch, attention in the middle is not."""
    graph = attention_block(torch.float32, turned=turned)
    tensors = [torch.randn([int(size) for size in value.shape]) for value in graph.inputs]
    found = []
    modules = graph.to_torch(kernels="triton"), graph.to_torch()
    called.clear()
    for module in modules:
        given = [tensor.clone().requires_grad_() for tensor in tensors]
        module(*given).sin().sum().backward()
        found.append([tensor.grad for tensor in given])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)
    assert called == ["attention"] * turned + ["attention_gradient"]
    (made,) = with_kernels(graph).operators
    assert bool(made.gradients.kernels) == (not turned) and (made.in_stages is made.body) == (not turned)


def attention_of_latents(tokens: int, dtype: torch.dtype) -> Graph:
    """Attention as a factorized decoder has it: keys and values of two heads are products with latents of rank 8."""
    graph = Graph("factorized")
    build = Builder(graph)
    generator = torch.Generator().manual_seed(0)
    x = build.input("x", (1, tokens, 32), dtype)

    def linear(name: str, given: Value, size: int) -> Value:
        weight = torch.randn(size, int(given.shape[2]), generator=generator) / int(given.shape[2]) ** 0.5
        return build.linear(given, build.parameter(name, weight.to(dtype)))  # type: ignore[no-any-return]

    def heads(value: Value) -> Value:
        return build.permute(build.reshape(value, shape=(1, tokens, 2, 16)), dims=(0, 2, 1, 3))  # type: ignore[no-any-return]

    q = heads(linear("q", x, 32))
    k, v = (heads(linear(f"{name}_up", linear(f"{name}_down", x, 8), 32)) for name in "kv")
    y = build.permute(build.attention(q, k, v, scale=0.25, is_causal=True), dims=(0, 2, 1, 3))
    graph.outputs = [build.reshape(y, shape=(1, tokens, 32))]
    return graph


@pytest.mark.parametrize(("tokens", "joined"), [(6, True), (200, False)])
def test_factorized_attention_is_trained_by_the_kernels_of_its_gradients(
    called: list[str], tokens: int, joined: bool
) -> None:
    """Few queries mix latents in place of values; backward these are computed once, and so are keys, and attention that
    reads them has its kernels, from which torch goes on to latents and weights."""
    x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for dtype, kernels in ((torch.float32, "triton"), (torch.float32, None), (torch.float64, None)):
        module = attention_of_latents(tokens, dtype).to_torch(kernels=kernels)
        called.clear()
        given = x.to(dtype, copy=True).requires_grad_()
        module(given).sin().sum().backward()
        found.append([given.grad, *(parameter.grad for parameter in module.parameters())])
        if kernels:
            assert called == [*["attention"] * joined, "attention_gradient"]
    assert len(found[0]) == 6
    for own, other, true in zip(*found, strict=True):
        errors = [float((one.double() - true).abs().max() / true.abs().max()) for one in (own, other)]
        assert errors[0] <= max(2 * errors[1], 2e-6)


@pytest.mark.parametrize(
    "name", ["turned_latents_attention", "latent_keys_with_bias_attention", "latent_values_attention",
             "latent_pair_attention"],
)  # fmt: skip
def test_gradients_of_latents_go_through_those_of_attention(called: list[str], name: str) -> None:
    graph = form_graph(name, torch.float32)
    tensors = drawn(graph)
    node = fuse(Builder(graph), trace(graph.nodes, graph.outputs), "fused")  # type: ignore[arg-type]
    body = canonical(body_of(node))
    made = kernel_operator(body, "fused", to_torch(body))
    read = [tensors[value] for value in node.inputs]  # type: ignore[index]
    called.clear()
    found = []
    for call, dtype in ((made.overload, torch.float32), (made.body, torch.float64)):
        given = [one.to(dtype).requires_grad_() if one.is_floating_point() else one for one in read]
        wanted = [one for one in given if one.requires_grad]
        found.append(torch.autograd.grad(call(*given).sin().sum(), wanted))
    assert called == [body.name, "attention", "attention_gradient"]
    for own, true in zip(*found, strict=True):
        torch.testing.assert_close(own.double(), true, rtol=1e-4, atol=1e-4)  # of shifts of whole rows it is zero


def test_torch_finds_no_fault_with_the_operators_of_attention_and_its_gradients() -> None:
    (made,) = with_kernels(attention_block(torch.float32, turned=False)).operators
    given = [torch.randn([int(s) for s in v.shape], requires_grad=True) for v in made.reads]
    torch.library.opcheck(made.overload, given)
    ((_, operator),) = made.backward
    read = [torch.randn([int(size) for size in value.shape], requires_grad=True) for value in operator.reads]
    torch.library.opcheck(operator.overload, read)
    second = []
    for call in (made.overload, made.body):
        with sdpa_kernel(SDPBackend.MATH):  # torch has no derivative of the gradients of its other kernels
            first = torch.autograd.grad(call(*given).sin().sum(), given, create_graph=True)
        second.append(torch.autograd.grad(sum(one.square().sum() for one in first), given))
    for own, other in zip(*second, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (2, 1, 5, 5), (3, 1, 1), (1,), (2, 1, 1, 5)], ids=str)
def test_the_gradient_of_a_bias_of_scores_is_an_operator_of_its_own(called: list[str], shape: tuple[int, ...]) -> None:
    """It is called where the bias is trained, and not where it is a mask."""
    graph = Graph("biased")
    build = Builder(graph)
    q, k, v, bias = (
        build.input(name, shape if name == "bias" else (2, 3, 5, 8), torch.float32) for name in ("q", "k", "v", "bias")
    )
    scores = build.add(build.mul(build.matmul(q, build.permute(k, dims=(0, 1, 3, 2))), 0.3), bias)
    graph.outputs = [build.matmul(build.softmax(scores, dim=3), v)]
    (made,) = with_kernels(graph).operators
    assert not made.gradients.left and [one.of for one, _ in made.backward] == [((0,), (1,), (3,)), ((2,),)]
    given = [torch.randn([int(size) for size in value.shape], requires_grad=True) for value in made.reads]
    called.clear()
    own, other = (torch.autograd.grad(call(*given).sin().sum(), given) for call in (made.overload, made.body))
    for one, another in zip(own, other, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-5)  # of shifts of whole rows it is zero
    first, second = (operator.graph.name for _, operator in made.backward)
    assert called[1:] == [first, second]
    called.clear()
    torch.autograd.grad(made.overload(*given[:2], given[2].detach(), given[3]).sin().sum(), given[0])
    assert called[1:] == [first]


def test_a_table_of_relative_positions_is_trained_behind_the_operator(called: list[str]) -> None:
    """As T5 and Swin have it: a bias for each head is looked up by the distance of two places."""
    graph = Graph("relative")
    build = Builder(graph)
    q, k, v = (build.input(name, (2, 3, 5, 8), torch.float32) for name in "qkv")
    table = build.parameter("table", torch.randn(7, 3))
    places = build.input("places", (5, 5), torch.int64)
    bias = build.permute(build.embedding(table, places), dims=(2, 0, 1))
    graph.outputs = [build.attention(q, k, v, bias, scale=0.3)]
    tensors = [*(torch.randn(2, 3, 5, 8) for _ in range(3)), (torch.arange(25) % 7).reshape(5, 5)]
    found = []
    modules = graph.to_torch(kernels="triton"), graph.to_torch()
    called.clear()
    for module in modules:
        given = [one.clone().requires_grad_(one.is_floating_point()) for one in tensors]
        module(*given).sin().sum().backward()
        found.append([*(one.grad for one in given[:3]), next(module.parameters()).grad])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    assert len([name for name in called if name.endswith("_gradient")]) == 2


def test_torch_finds_no_fault_with_operators_of_gradients() -> None:
    for made in with_kernels(block(torch.float32)).operators:
        for _, operator in made.backward:
            given = [torch.randn([int(size) for size in value.shape], requires_grad=True) for value in operator.reads]
            torch.library.opcheck(operator.overload, given)


@pytest.mark.usefixtures("doubles")
def test_gradients_of_gradients_are_right() -> None:
    """Those of kernels, and those of the body in torch, on which they rest where rows share something."""
    for made in with_kernels(block(torch.float64)).operators:
        given = [torch.randn([int(size) for size in v.shape]).double().requires_grad_() for v in made.reads]
        assert torch.autograd.gradcheck(made.overload, given)
        assert torch.autograd.gradgradcheck(made.overload, given)


def test_a_result_without_a_gradient_leaves_all_to_torch() -> None:
    module, plain = block(torch.float32).to_torch(kernels="triton"), block(torch.float32).to_torch()
    gradients = []
    for one in (module, plain):
        x = torch.linspace(-1, 1, 32).reshape(4, 8).requires_grad_()
        gradients.append(torch.autograd.grad(one(x)[1].sum(), x)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rows", [4, symbol("rows")], ids=["static", "dynamic"])
def test_a_training_step_compiles_whole(rows: object) -> None:
    graph = block(torch.float32, rows)
    if rows != 4:
        graph.symbols[rows] = (2, None)  # type: ignore[index]
    module = graph.to_torch(kernels="triton")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=rows != 4)
    gradients = []
    for one in (compiled, module):
        x = torch.linspace(-1, 1, 32).reshape(4, 8).requires_grad_()
        normed, stream = one(x)
        gradients.append(torch.autograd.grad(normed.sin().sum() + stream.square().sum(), [x, *module.parameters()]))
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)


def test_the_gradients_of_a_decoder_block() -> None:
    """What each row has for itself; attention, with the rotary codes before it, leaves its gradients to torch."""
    found = with_kernels(decoder_block(tokens=16, width=32, hidden=48))
    assert {made.graph.name: [one.of for one, _ in made.backward] for made in found.operators} == {
        "neg_concat_mul_add_matmul_softmax": [],
        "add_rms_norm": [((0, 1), (2,))],
        "silu_mul": [((0,), (1,))],
    }


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_gradients_compile_ahead_of_time_without_spills() -> None:
    for made in with_kernels(block(torch.float16)).operators:
        for _, operator in made.backward:
            kernel = operator.kernel
            sizes = {dim: int(dim.size) for dim in kernel.region.sized}
            for form in kernel.forms:
                compiled = compile_kernel(kernel.source(form), sizes, "sm_90")
                assert compiled.spilled == 0 and compiled.registers <= 64


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("dtype", "architecture"), [(torch.bfloat16, "sm_90"), (torch.float32, "sm_80")])
def test_gradients_of_wide_heads_compile_without_spills(dtype: torch.dtype, architecture: str) -> None:
    (made,) = with_kernels(form_graph("large_heads_attention", dtype, 256, 256)).operators
    ((_, operator),) = made.backward
    sizes = {dim: int(dim.size) for dim in operator.kernel.region.sized}
    source: Source | None = operator.kernel.source()
    while source is not None:
        assert compile_kernel(source, sizes, architecture).spilled == 0, source.form
        source = source.then
