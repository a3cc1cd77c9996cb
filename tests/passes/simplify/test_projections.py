"""Projections of heads as one, and heads told apart once they are laid out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, randn

import regauge
from regauge.ir.edit import Builder, remove_dead
from regauge.ir.graph import Graph, Value
from regauge.ir.sizes.expressions import Size
from regauge.passes.simplify.limits import limits_of
from regauge.passes.simplify.projections import join_projections
from simplifying import BATCH, made, ops, same_function

QUERIES, KEYS = (0, 2, 1, 3), (0, 2, 3, 1)


def joined(graph: Graph) -> Graph:
    """After the step alone, as if the graph had been loaded from a file; a second run finds nothing to do."""
    after = graph.copy()
    after.metadata["onnx"] = "a file"
    join_projections(after, limits_of(after, 0.0, False, folds_file=False))
    remove_dead(after)
    same_function(graph, after)
    text = str(after)
    assert join_projections(after, limits_of(after, 0.0, False, folds_file=False)) == 0 and str(after) == text
    return after


def laid_out(build: Builder, x: Value, heads: int, width: int, dims: Sequence[int]) -> Value:
    shaped = build.reshape(x, shape=(*x.shape[:-1], heads, width))
    return build.permute(shaped, dims=tuple(dims))  # type: ignore[no-any-return]


def projected(build: Builder, x: Value, name: str, outputs: int, bias: bool = True) -> Value:
    weight = build.parameter(f"{name}.weight", randn(outputs, int(x.shape[-1])).double())
    vector = build.parameter(f"{name}.bias", randn(outputs).double()) if bias else None
    return build.linear(x, weight, vector)  # type: ignore[no-any-return]


def attention(build: Builder, x: Value, keys: Sequence[int] = KEYS, biases: str = "qv") -> list[Value]:
    """Queries of three heads, keys and values of one, with and without biases."""
    values = [
        (name, projected(build, x, name, 4 * heads, name in biases), heads)
        for name, heads in zip("qkv", (3, 1, 1), strict=True)
    ]
    return [
        build.tanh(laid_out(build, value, heads, 4, keys if name == "k" else QUERIES)) for name, value, heads in values
    ]  # fmt: skip


@pytest.mark.parametrize("keys", [KEYS, QUERIES])
def test_projections_of_one_value_become_one(keys: Sequence[int]) -> None:
    after = joined(made(lambda b, x: attention(b, x, keys), x=(2, 5, 6)))
    turned = ["permute"] if keys == KEYS else []
    assert sorted(ops(after)) == sorted(["linear", "reshape", "permute", "split", "tanh", "tanh", "tanh", *turned])
    assert {name: p.shape for name, p in after.parameters.items()} == {"q_k_v.weight": (20, 6), "q_k_v.bias": (20,)}


def test_parts_of_a_split_are_laid_out_before_it() -> None:
    def parts(build: Builder, x: Value) -> list[Value]:
        pieces = build.split(x, sizes=(8, 8, 4), dim=2)
        order = zip(pieces, (2, 2, 1), (QUERIES, KEYS, QUERIES), strict=True)
        return [build.tanh(laid_out(build, piece, heads, 4, dims)) for piece, heads, dims in order]

    after = joined(made(parts, x=(BATCH, 5, 20)))
    assert ops(after)[:3] == ["reshape", "permute", "split"] and ops(after).count("permute") == 2
    assert len(after.nodes) == 7


def of_another_width(build: Builder, x: Value) -> list[Value]:
    return [laid_out(build, projected(build, x, name, 8), 8 // w, w, QUERIES) for name, w in (("q", 2), ("k", 4))]


def read_twice(build: Builder, x: Value) -> list[Value]:
    q, k = (projected(build, x, name, 8) for name in "qk")
    return [*(laid_out(build, value, 2, 4, QUERIES) for value in (q, k)), build.relu(q)]


def shared(build: Builder, x: Value) -> list[Value]:
    weight = build.parameter("w", randn(8, 6).double())
    return [laid_out(build, build.linear(y, weight), 2, 4, QUERIES) for y in (x, x)]


def of_two_values(build: Builder, x: Value) -> list[Value]:
    y = build.tanh(x)
    return [laid_out(build, projected(build, v, n, 8), 2, 4, QUERIES) for v, n in ((x, "q"), (y, "k"))]


def in_part(build: Builder, x: Value) -> list[Value]:
    first, second = build.split(x, sizes=(4, 2), dim=2)
    return [laid_out(build, first, 2, 2, QUERIES), build.relu(second)]


@pytest.mark.parametrize("function", [of_another_width, read_twice, shared, of_two_values, in_part])
def test_what_is_not_laid_out_alike_stays(function: Callable[..., Any]) -> None:
    graph = made(lambda b, x: [b.tanh(v) for v in function(b, x)], x=(2, 5, 6))
    assert str(joined(graph)) == str(graph)


@pytest.mark.parametrize("shape", [(8, 1024, 64), (BATCH, 5, 64)])
def test_projections_whose_copies_cost_more_than_the_nodes_stay(shape: tuple[Size, ...]) -> None:
    """Numbers of the results are copied by the split; how many of a dynamic size, nobody knows."""
    graph = made(lambda b, x: attention(b, x), x=shape)
    assert str(joined(graph)) == str(graph)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).view(2, 5, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.out(heads.reshape(2, 5, 8))


def test_an_attention_of_a_file_works_on_matrices_and_has_one_projection(tmp_path: Path) -> None:
    module, x, path = Attention().eval(), randn(2, 5, 8), tmp_path / "attention.onnx"
    torch.onnx.export(module, (x,), str(path), dynamo=True, verbose=False, optimize=False)
    graph = regauge.optimize(regauge.load(path), "simplify")
    assert ops(graph) == [
        "reshape", "layer_norm", "linear", "reshape", "permute", "split", "permute", "matmul", "softmax", "matmul",
        "permute", "reshape", "linear", "reshape", "add",
    ]  # fmt: skip
    torch.testing.assert_close(graph.run([x])[0], module(x), rtol=1e-5, atol=1e-5)
    graph.to_onnx(tmp_path / "small.onnx")


def test_a_graph_from_torch_keeps_its_projections() -> None:
    graph = regauge.optimize(regauge.capture(Attention().eval(), (randn(2, 5, 8),)), "simplify")
    assert ops(graph).count("linear") == 4 and "q.weight" in graph.parameters


def product(build: Builder, x: Value, name: str, outputs: int, bias: bool) -> Value:
    """A linear map as exporters write it: a product with a stored transpose, and a sum."""
    made = build.matmul(x, build.parameter(f"{name}.weight", randn(int(x.shape[-1]), outputs).double()))
    return build.add(made, build.parameter(f"{name}.bias", randn(outputs).double())) if bias else made  # type: ignore[no-any-return]


@pytest.mark.parametrize("biases", ["qkv", "qv", ""])
def test_products_with_sums_become_one_projection(biases: str) -> None:
    def heads(build: Builder, x: Value) -> list[Value]:
        values = [
            (product(build, x, name, 8, name in biases), dims)
            for name, dims in zip("qkv", (QUERIES, KEYS, QUERIES), strict=True)
        ]
        return [build.tanh(laid_out(build, value, 2, 4, dims)) for value, dims in values]

    after = joined(made(heads, x=(2, 5, 6)))
    assert sorted(ops(after)) == sorted(["linear", "reshape", "permute", "permute", "split", "tanh", "tanh", "tanh"])
    vectors = {"q_k_v.bias": (24,)} if biases else {}
    assert {name: p.shape for name, p in after.parameters.items()} == {"q_k_v.weight": (24, 6), **vectors}


def test_products_whose_weight_or_bias_others_read_stay_apart() -> None:
    def heads(build: Builder, x: Value) -> list[Value]:
        vector = build.parameter("bias", randn(8).double())
        values = [build.add(product(build, x, name, 8, False), vector) for name in "qk"]
        return [build.tanh(laid_out(build, value, 2, 4, QUERIES)) for value in values]

    after = joined(made(heads, x=(2, 5, 6)))
    assert ops(after).count("matmul") == 2 and "split" not in ops(after)


def fused(
    build: Builder,
    x: Value,
    sizes: Sequence[int] = (1, 1, 1),
    dims: Sequence[int] = (2, 0, 3, 1, 4),
    bias: bool = True,
    squeezed: bool = True,
    make: Callable[..., Value] = projected,
) -> list[Value]:
    """One projection to queries, keys and values of two heads of 4, split where they lie outermost."""
    whole = make(build, x, "qkv", 24, bias)
    turned = build.permute(build.reshape(whole, shape=(*x.shape[:2], 3, 2, 4)), dims=tuple(dims))
    axis = list(dims).index(2)
    parts = build.split(turned, sizes=tuple(sizes), dim=axis)
    return [build.tanh(build.squeeze(part, dims=(axis,)) if squeezed else part) for part in parts]


LONG = (16, 1024, 6)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"squeezed": False}, {"sizes": (2, 1), "squeezed": False}, {"make": product}],
    ids=["plain", "no-bias", "not-squeezed", "unequal", "product"],
)
def test_a_projection_whose_copies_cost_more_than_nodes_is_several(options: dict[str, Any]) -> None:
    after = joined(made(lambda b, x: fused(b, x, **options), x=LONG))
    sizes = options.get("sizes", (1, 1, 1))
    assert sorted(ops(after)) == sorted(["linear", "reshape", "permute", "tanh"] * len(sizes))
    shapes = [p.shape for name, p in after.parameters.items() if "weight" in name]
    assert shapes == [(8 * size, 6) for size in sizes]
    assert len(after.parameters) == len(sizes) * (1 + options.get("bias", True))


def outer_heads(build: Builder, x: Value) -> list[Value]:
    """Heads lie outermost: a part is no run of rows of the weight."""
    whole = projected(build, x, "qkv", 24)
    turned = build.permute(build.reshape(whole, shape=(*x.shape[:2], 2, 3, 4)), dims=(3, 0, 2, 1, 4))
    return [build.tanh(part) for part in build.split(turned, sizes=(1, 1, 1), dim=0)]


def read_before_it_is_split(build: Builder, x: Value) -> list[Value]:
    first = fused(build, x)
    reshaped = next(node for node in build.graph.nodes if node.op == "reshape").output
    return [*first, build.relu(reshaped)]


@pytest.mark.parametrize(
    ("function", "shape"),
    [(fused, (2, 5, 6)), (fused, (BATCH, 1024, 6)), (outer_heads, LONG), (read_before_it_is_split, LONG)],
    ids=["short", "open", "outer-heads", "read-elsewhere"],
)
def test_a_projection_stays_one_where_it_is_no_gain_or_not_the_same(
    function: Callable[..., Any], shape: tuple[Size, ...]
) -> None:
    graph = made(lambda b, x: function(b, x), x=shape)
    assert str(joined(graph)) == str(graph)
