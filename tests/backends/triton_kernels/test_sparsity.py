"""Weights with zeros laid out for kernels: what is stored stands for the same weight, and is read where that gains."""

import pytest
import torch

import regauge
from regauge.backends.torch_module.kernels import with_kernels
from regauge.backends.triton_kernels.sparsity import dense_of, is_bitmap, n_of_m_of, pack_zeros, stored, stored_bitmap
from regauge.ir.edit import Builder
from regauge.ir.fusion.plan import plan_fusion
from regauge.ir.fusion.products import few_bit_sides
from regauge.ir.graph import Graph
from regauge.ir.sizes.expressions import symbol
from regauge.optimize import optimize

PATTERNS = [(1, 2), (1, 4), (2, 4), (1, 8), (3, 8), (4, 8)]


def sparse(outputs: int, inputs: int, keep: int, of: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    there = torch.rand(outputs, inputs // of, of, generator=generator).argsort(2) < keep
    return (torch.randn(outputs, inputs, generator=generator) * there.flatten(1)).to(dtype)


def layer(weight: torch.Tensor, rows: object = 4, turned: bool = False) -> Graph:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (rows, weight.shape[1]), weight.dtype)
    w = build.parameter("w", weight.t().contiguous() if turned else weight)
    graph.outputs = [build.silu(build.matmul(x, w) if turned else build.linear(x, w))]
    return graph


@pytest.mark.parametrize(("keep", "of"), PATTERNS)
@pytest.mark.parametrize("inputs", [24, 128])
def test_what_is_stored_is_the_weight(keep: int, of: int, inputs: int) -> None:
    weight = sparse(5, inputs, keep, of)
    weight[0] = 0  # fewer than there may be
    weight[1, 0], weight[1, 1:of] = torch.inf, 0
    values, mask = stored(weight, keep, of)
    graph = Graph("g")
    build = Builder(graph)
    read = build.parameter("v", values), build.parameter("m", mask, "buffer")
    graph.outputs = [dense_of(build, *read, keep, of)]
    (found,) = graph.run([])
    assert torch.equal(found, weight)
    assert values.numel() == weight.numel() * keep // of
    assert mask.numel() == weight.numel() // (of if inputs // of % (8 // of) else 8)


@pytest.mark.parametrize(("keep", "of"), PATTERNS)
def test_the_pattern_with_fewest_bytes_is_found(keep: int, of: int) -> None:
    assert n_of_m_of(sparse(64, 256, keep, of)) == (keep, of)
    assert n_of_m_of(torch.randn(64, 256)) is None
    assert n_of_m_of(sparse(64, 64, keep, of)) is None  # too short for tensor cores


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows", [4, symbol("rows")], ids=str)
def test_a_product_with_a_sparse_weight_is_a_kernel(rows: object, turned: bool) -> None:
    graph = layer(sparse(96, 256, 2, 4), rows, turned)
    found = with_kernels(graph)
    assert not found.left
    (operator,) = found.operators
    assert {tuple(map(str, value.shape)) for value in operator.reads} >= {("96", "2", "64"), ("96", "32")}
    x = torch.randn(4, 256)
    torch.testing.assert_close(graph.to_torch(kernels="triton")(x), graph.to_torch()(x))


def test_the_plan_counts_the_bytes_that_are_stored() -> None:
    graph = layer(sparse(96, 256, 2, 4, torch.float16))
    assert len(pack_zeros(graph)) == 1
    (region,) = plan_fusion(graph, contractions=False).regions
    bytes_of = {"x": 4 * 256 * 2, "values": 96 * 128 * 2, "mask": 96 * 32, "result": 4 * 96 * 2}
    assert plan_fusion(graph, contractions=False).bytes == sum(bytes_of.values())
    assert region.kind == "contraction" and few_bit_sides(region) == [(False, True)]


def test_dense_weights_and_many_rows_and_weights_with_two_readers_stay() -> None:
    assert not pack_zeros(layer(torch.randn(96, 256)))
    assert not pack_zeros(layer(sparse(96, 256, 2, 4), rows=513))
    graph = layer(sparse(96, 256, 2, 4))
    Builder(graph).neg(graph.parameters["w"])
    assert not pack_zeros(graph)


def test_what_sparsify_makes_is_stored_sparse_and_learns() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 16)).eval()
    graph = regauge.capture(model, (torch.randn(2, 256),), dynamic={0: {0: "rows"}})
    sparse_graph = optimize(graph, "sparsify{pattern=2:4}")
    module = sparse_graph.to_torch(kernels="triton")
    x = torch.randn(3, 256)
    torch.testing.assert_close(module(x), sparse_graph.to_torch()(x), rtol=1e-5, atol=1e-5)
    module(x).square().sum().backward()
    sizes = {tuple(parameter.shape): parameter.grad is not None for parameter in module.parameters()}
    assert sizes[128, 2, 64] and sizes[16, 2, 32]


def scattered(outputs: int, inputs: int, kept: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight with zeros anywhere."""
    generator = torch.Generator().manual_seed(1)
    there = torch.rand(outputs, inputs, generator=generator) < kept
    return (torch.randn(outputs, inputs, generator=generator) * there).to(dtype)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 1.0])
def test_what_a_bitmap_stores_is_the_weight(kept: float) -> None:
    weight = scattered(7, 96, kept)
    weight[2] = 0
    weight[3] = torch.inf
    graph = Graph("g")
    build = Builder(graph)
    values, mask, starts = stored_bitmap(weight)
    words = build.parameter("m", mask, "buffer"), build.parameter("b", starts, "buffer")
    graph.outputs = [build.bitmap(build.parameter("v", values), *words, of=32)]
    (found,) = graph.run([])
    assert torch.equal(found, weight) and len(values) == int((weight != 0).sum())


def test_a_weight_of_one_entry_has_a_kernel() -> None:
    weight = torch.zeros(96, 96)
    assert not is_bitmap(weight)
    weight[1, 5] = 2.0
    graph = layer(weight)
    found = with_kernels(graph)
    assert not found.left and any(node.op == "bitmap" for node in found.operators[0].graph.nodes)
    x = torch.randn(4, 96)
    torch.testing.assert_close(graph.to_torch(kernels="triton")(x), graph.to_torch()(x))


def test_a_bitmap_is_for_zeros_that_lie_anywhere() -> None:
    weight = scattered(64, 256, 0.3, torch.float16)
    assert is_bitmap(weight) and n_of_m_of(weight) is None
    assert not is_bitmap(scattered(64, 256, 0.7, torch.float16))
    assert not is_bitmap(scattered(64, 240, 0.1))  # no whole words
    half = sparse(64, 256, 2, 4, torch.float16)  # 1.125 bytes for each entry, of a bitmap 1.25
    assert n_of_m_of(half) == (2, 4)
    eighth = sparse(64, 256, 4, 8, torch.float16) * scattered(64, 256, 0.1, torch.float16).ne(0)
    assert is_bitmap(eighth) and n_of_m_of(eighth) is None


@pytest.mark.parametrize("turned", [False, True])
def test_the_plan_counts_the_entries_and_the_bits_of_a_bitmap(turned: bool) -> None:
    weight = scattered(96, 256, 0.3, torch.float16)
    graph = layer(weight, turned=turned)
    assert len(pack_zeros(graph)) == 1
    plan = plan_fusion(graph, contractions=False)
    (region,) = plan.regions
    words = 2 * 96 * 8 * 4
    assert plan.bytes == 4 * 256 * 2 + int((weight != 0).sum()) * 2 + words + 4 * 96 * 2
    assert few_bit_sides(region) == [(False, True)]
    assert {node.op for node in region.nodes} >= {"bitmap", "silu"}


def test_weights_cut_one_by_one_are_stored_as_bitmaps_and_learn() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 16)).eval()
    graph = regauge.capture(model, (torch.randn(2, 256),), dynamic={0: {0: "rows"}})
    cut = optimize(graph, "sparsify{pattern=unstructured,ratio=0.7}")
    found = with_kernels(cut)
    assert not found.left and sum(op.graph.nodes[0].op == "bitmap" for op in found.operators) == 2
    module, x = cut.to_torch(kernels="triton"), torch.randn(3, 256)
    torch.testing.assert_close(module(x), cut.to_torch()(x), rtol=1e-5, atol=1e-5)
    module(x).square().sum().backward()
    learn = [parameter for parameter in module.parameters() if parameter.dim() == 1 and len(parameter) > 128]
    assert len(learn) == 2 and all(bool(parameter.grad.abs().sum() > 0) for parameter in learn)
