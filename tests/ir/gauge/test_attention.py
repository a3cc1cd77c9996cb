"""Gauge classes inside attention: V-O and Q-K pairs are general linear per head, heads can only be permuted."""

import torch

from regauge.ir.dims.groups import find_group
from regauge.ir.edit import Builder
from regauge.ir.gauge.classes import Gauge, gauges
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run

WIDTH, HEADS, SIZE, LENGTH = 6, 3, 4, 5


def attention_block() -> Graph:
    torch.manual_seed(0)
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, LENGTH, WIDTH), torch.float64)

    def project(name: str):  # type: ignore[no-untyped-def]
        weight = build.parameter(name, torch.randn(HEADS * SIZE, WIDTH, dtype=torch.float64))
        split = build.reshape(build.linear(x, weight), shape=(2, LENGTH, HEADS, SIZE))
        return build.permute(split, dims=(0, 2, 1, 3))

    mixed = build.attention(project("q"), project("k"), project("v"), is_causal=False, scale=0.5)
    joined = build.reshape(build.permute(mixed, dims=(0, 2, 1, 3)), shape=(2, LENGTH, HEADS * SIZE))
    graph.outputs = [build.linear(joined, build.parameter("o", torch.randn(WIDTH, HEADS * SIZE, dtype=torch.float64)))]
    return graph


def per_head(change: torch.Tensor) -> torch.Tensor:
    return torch.block_diag(*[change] * HEADS)


def test_the_dims_of_attention() -> None:
    graph = attention_block()
    found = gauges(graph)
    assert Gauge.GENERAL in found[find_group(graph, "v:0.1").dim]
    assert Gauge.GENERAL in found[find_group(graph, "q:0.1").dim]
    assert found[find_group(graph, "q:0.0").dim] == Gauge.PERMUTE
    assert {str(m) for m in find_group(graph, "q:0.0").members} == {"q:0", "k:0", "v:0", "o:1"}


def packed_block() -> Graph:
    """Queries, keys and values as three rows of one axis, ``(3 h d)``, as torch packs them: they share the Dim d."""
    torch.manual_seed(0)
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (LENGTH, WIDTH), torch.float64)
    projected = build.linear(x, build.parameter("qkv", torch.randn(3 * HEADS * SIZE, WIDTH, dtype=torch.float64)))
    split = build.permute(build.reshape(projected, shape=(LENGTH, 3, HEADS, SIZE)), dims=(1, 2, 0, 3))
    mixed = build.attention(*(build.select(split, dim=0, index=i) for i in range(3)), is_causal=False, scale=0.5)
    joined = build.reshape(build.permute(mixed, dims=(1, 0, 2)), shape=(LENGTH, HEADS * SIZE))
    graph.outputs = [build.linear(joined, build.parameter("o", torch.randn(WIDTH, HEADS * SIZE, dtype=torch.float64)))]
    return graph


def test_a_dim_that_queries_keys_and_values_share_takes_rotations_only() -> None:
    graph = packed_block()
    assert gauges(graph)[find_group(graph, "qkv:0.2").dim] == Gauge.PERMUTE | Gauge.SIGN | Gauge.ORTHOGONAL
    noise = torch.randn(SIZE, SIZE, dtype=torch.float64)
    x = torch.randn(LENGTH, WIDTH, dtype=torch.float64)
    for change, same in [(torch.linalg.qr(noise)[0], True), (noise + 3 * torch.eye(SIZE), False)]:
        all_three = torch.block_diag(*[change] * (3 * HEADS))
        weights = {
            "qkv": all_three @ graph.parameters["qkv"].tensor,
            "o": graph.parameters["o"].tensor @ torch.linalg.inv(per_head(change)),
        }
        assert torch.allclose(run(graph, [x], weights=weights)[0], run(graph, [x])[0]) is same


def test_a_general_map_of_values_is_undone_by_the_output_projection() -> None:
    graph = attention_block()
    change = per_head(torch.randn(SIZE, SIZE, dtype=torch.float64) + 3 * torch.eye(SIZE))
    weights = {
        "v": change @ graph.parameters["v"].tensor,
        "o": graph.parameters["o"].tensor @ torch.linalg.inv(change),
    }
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(run(graph, [x], weights=weights), run(graph, [x]))


def test_a_general_map_of_queries_is_undone_by_the_keys() -> None:
    graph = attention_block()
    change = per_head(torch.randn(SIZE, SIZE, dtype=torch.float64) + 3 * torch.eye(SIZE))
    weights = {
        "q": change @ graph.parameters["q"].tensor,
        "k": torch.linalg.inv(change).T @ graph.parameters["k"].tensor,
    }
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(run(graph, [x], weights=weights), run(graph, [x]))
