"""Attention: values against torch and onnxruntime; heads, shared heads and head sizes can be cut, the scale stays."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import nn, randn

from cutting import cut_all, free_sizes
from onnx_models import halves, masked, pruned
from onnx_node import check_node, normal, operators
from regauge.backends.run_onnxruntime import Session
from regauge.frontends.capture import capture
from regauge.frontends.from_onnx import load
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.ir.operator import find_aten
from regauge.ir.ops.attention import attention, capped_attention
from regauge.ir.running.interpret import run

# -- the record --------------------------------------------------------------------------------------------------------


def block(heads: int, shared: int, *, mask: str = "", **attributes: Any) -> Graph:
    """Self attention of ``heads`` query heads of 4 over ``shared`` key heads; ``mask`` names the shape of its bias."""
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 5, 6), torch.float32)

    def project(name: str, count: int) -> Value:
        joint = build.linear(x, build.parameter(name, randn(count * 4, 6)))
        return build.permute(build.reshape(joint, shape=(2, 5, count, 4)), dims=(0, 2, 1, 3))

    q, k, v = project("q", heads), project("k", shared), project("v", shared)
    bias = {"heads": (heads, 5, 5), "one": (1, 5, 5)}.get(mask)
    added = None if bias is None else build.parameter("bias", randn(*bias))
    mixed = build.attention(q, k, v, added, scale=0.5, enable_gqa=heads != shared, **attributes)
    joined = build.reshape(build.permute(mixed, dims=(0, 2, 1, 3)), shape=(2, 5, heads * 4))
    graph.outputs = [build.linear(joined, build.parameter("o", randn(3, heads * 4)))]
    return graph


def test_the_dims_of_attention() -> None:
    graph = block(4, 4)
    assert free_sizes(graph) == {"q:0.0": 4, "q:0.1": 4, "v:0.1": 4}
    cut_all(graph, [randn(2, 5, 6)])


def test_query_heads_that_share_keys() -> None:
    graph = block(6, 2)
    assert free_sizes(graph) == {"q:0.0": 2, "q:0.1": 3, "q:0.2": 4, "v:0.1": 4}
    cut_all(graph, [randn(2, 5, 6)])


def test_a_bias_is_cut_with_the_heads() -> None:
    with_heads, without = block(4, 4, mask="heads"), block(4, 4, mask="one")
    assert any(m.parameter.name == "bias" for g in with_heads.groups() if g.name == "q:0.0" for m in g.members)
    assert not any(m.parameter.name == "bias" for g in without.groups() if g.free for m in g.members)
    cut_all(with_heads, [randn(2, 5, 6)])
    cut_all(without, [randn(2, 5, 6)])


def test_capped_attention_without_much_of_a_cap_is_attention() -> None:
    q, k, v = randn(2, 4, 5, 6), randn(2, 2, 5, 6), randn(2, 2, 5, 3)
    for options in ({}, {"is_causal": True}, {"mask": torch.ones(5, 5).tril().bool()}, {"mask": randn(5, 5)}):
        mask = options.pop("mask", None)
        capped = capped_attention(q, k, v, mask, scale=0.3, softcap=1e4, enable_gqa=True, **options)
        torch.testing.assert_close(
            capped, attention(q, k, v, mask, scale=0.3, enable_gqa=True, **options), atol=1e-4, rtol=1e-4
        )


# -- ATen forms --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, *mask, **self.options)


Q, K, V = randn(2, 4, 5, 6), randn(2, 4, 7, 6), randn(2, 4, 7, 3)


@pytest.mark.parametrize(
    ("operands", "options"),
    [
        ((Q, K, V), {}),
        ((Q, K, V, randn(5, 7)), {}),
        ((Q, K, V, randn(2, 1, 5, 7) > 0), {"scale": 0.25}),
        ((Q, K[:, :2], V[:, :2]), {"enable_gqa": True}),
        ((Q, Q, Q), {"is_causal": True}),
        ((Q[:, 0], K[:, 0], V[:, 0]), {}),
    ],
)
def test_captured_attention(operands: tuple[torch.Tensor, ...], options: dict[str, Any]) -> None:
    graph = capture(Attention(**options), operands)
    assert operators(graph) == ["attention"]
    assert graph.nodes[0].attributes["scale"] == options.get("scale", 1 / math.sqrt(6))


def through(name: str, *operands: Any, **options: Any) -> Any:
    """The first result of an ATen operator's adapter, computed on tensors."""
    graph = Graph()
    build = Builder(graph)
    given = [build.parameter(f"p{i}", x) if isinstance(x, torch.Tensor) else x for i, x in enumerate(operands)]
    found = find_aten(name)
    assert found is not None and found[1] is not None
    results = found[1](build, *given, **options)
    graph.outputs = [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]
    return run(graph, [])


def test_the_forms_of_each_backend() -> None:
    expected = F.scaled_dot_product_attention(Q, Q, Q, is_causal=True)
    for name, arguments in {
        "_scaled_dot_product_flash_attention": (0.0, True),
        "_scaled_dot_product_flash_attention_for_cpu": (0.0, True),
        "_scaled_dot_product_efficient_attention": (None, False, 0.0, True),
        "_scaled_dot_product_cudnn_attention": (None, False, 0.0, True),
        "_scaled_dot_product_fused_attention_overrideable": (None, 0.0, True),
        "_scaled_dot_product_attention_math": (None, 0.0, True),
    }.items():
        torch.testing.assert_close(through(name, Q, Q, Q, *arguments)[0], expected)


PADDING = torch.tensor([[False, False, True], [False, True, True]])
LATER = torch.ones(3, 3).triu(1).bool()


@pytest.mark.parametrize(("mask", "mask_type"), [(None, None), (PADDING, 1), (LATER, 0)])
@pytest.mark.parametrize(("average", "same"), [(True, True), (False, False)])
def test_native_multi_head_attention(mask: Any, mask_type: Any, average: bool, same: bool) -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    q = randn(2, 3, 8)
    k = q if same else randn(2, 3, 8)
    weights = (layer.in_proj_weight, layer.in_proj_bias, layer.out_proj.weight, layer.out_proj.bias)
    operands = (q, k, k, 8, 2, *(w.detach() for w in weights), mask, True, average, mask_type)
    with torch.no_grad():
        expected = torch._native_multi_head_attention(*operands)
    for actual, wanted in zip(through("_native_multi_head_attention", *operands), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_native_encoder_layer(norm_first: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, norm_first=norm_first, batch_first=True).eval()
    own = layer.self_attn
    tensors = [own.in_proj_weight, own.in_proj_bias, own.out_proj.weight, own.out_proj.bias]
    rest = [layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias]
    rest += [layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias]
    x = randn(2, 3, 8)
    options = (activation == "gelu", norm_first, layer.norm1.eps)
    weights = ([t.detach() for t in tensors], [t.detach() for t in rest])
    actual = through("_transformer_encoder_layer_fwd", x, 8, 2, *weights[0], *options, *weights[1], PADDING, 1)[0]
    with torch.no_grad():
        expected = layer(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(actual[~PADDING], expected[~PADDING], rtol=1e-4, atol=1e-5)


# -- ONNX forms against onnxruntime ------------------------------------------------------------------------------------

HEADS, FEW = normal(2, 4, 5, 6), normal(2, 2, 7, 6)
ROWS, SOURCE = normal(2, 5, 24), normal(2, 7, 12)
CHANCE = np.random.default_rng(3).random((2, 1, 5, 7)) > 0.3

NODES: list[tuple[list[Any], dict[str, Any]]] = [
    ([HEADS, FEW, FEW], {}),
    ([HEADS, HEADS, HEADS, normal(4, 5, 5)], {"scale": 0.3}),
    ([HEADS, FEW, FEW, CHANCE], {}),
    ([HEADS, HEADS, HEADS], {"is_causal": 1}),
    ([HEADS, HEADS, HEADS, normal(5, 5)], {"is_causal": 1}),
    ([HEADS, HEADS, HEADS], {"softcap": 1.5}),
    ([ROWS, SOURCE, SOURCE], {"q_num_heads": 4, "kv_num_heads": 2}),
    ([HEADS, FEW, FEW, None, normal(2, 2, 3, 6), normal(2, 2, 3, 6)], {"results": 3}),
]


@pytest.mark.parametrize(("inputs", "options"), NODES)
def test_onnx_attention(inputs: list[Any], options: dict[str, Any]) -> None:
    graph = check_node("Attention", inputs, opset=23, **options)
    assert {"attention", "capped_attention"} & set(operators(graph))


def test_scores_as_a_result_are_kept_as_they_are() -> None:
    with pytest.warns(match="Attention"):
        assert operators(check_node("Attention", [HEADS, HEADS, HEADS], opset=23, results=4)) == ["onnx_call"]


def contrib(op: str, inputs: list[Any], **options: Any) -> Graph:
    return check_node(op, inputs, domain="com.microsoft", **options)


def test_contrib_attention() -> None:
    x, weight, bias = normal(2, 5, 6), normal(6, 24), normal(24)
    padding = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], dtype=np.int32)
    for inputs, options in (
        ([x, weight, bias], {}),
        ([x, weight, bias, padding], {}),
        ([x, weight, bias, None, None, normal(2, 2, 5, 5)], {"scale": 0.2}),
        ([x, weight, bias], {"unidirectional": 1}),
        ([x, weight, bias], {"qkv_hidden_sizes": [6, 6, 12]}),
    ):
        graph = contrib("Attention", inputs, constants=[1, 2], num_heads=2, **options)
        assert "attention" in operators(graph)


def test_contrib_multi_head_attention() -> None:
    x, other, padding = normal(2, 5, 8), normal(2, 7, 8), np.array([[1] * 7, [1] * 4 + [0] * 3], dtype=np.int32)
    for inputs, options in (
        ([x, other, other], {}),
        ([x, other, other, normal(24), padding], {}),
        ([x, other, other, None, None, normal(1, 2, 5, 7)], {"scale": 0.2}),
        ([x, x, x], {"unidirectional": 1}),
        ([x, x, x, None, None, None, normal(2, 2, 3, 4), normal(2, 2, 3, 4)], {"results": 3}),
    ):
        graph = contrib("MultiHeadAttention", inputs, num_heads=2, **options)
        assert "attention" in operators(graph)


def test_rotary_embeddings() -> None:
    x, places = normal(2, 2, 5, 8), np.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])
    for interleaved in (0, 1):
        for turned, options in ((8, {}), (4, {"rotary_embedding_dim": 4, "num_heads": 2})):
            tables = [normal(9, turned // 2), normal(9, turned // 2)]
            given = {"interleaved": interleaved, **options}
            contrib("RotaryEmbedding", [x, places, *tables], constants=[2, 3], **given)
            contrib("RotaryEmbedding", [x, np.array([2]), *tables], constants=[2, 3], **given)
            check_node("RotaryEmbedding", [x, *tables, places], opset=23, **given)
    rows = normal(2, 5, 16)
    check_node("RotaryEmbedding", [rows, normal(9, 4), normal(9, 4), places], opset=23, num_heads=2)
    check_node("RotaryEmbedding", [x, normal(2, 5, 4), normal(2, 5, 4)], opset=23)


# -- cut and written back ----------------------------------------------------------------------------------------------


def projected_model(nodes: list[Any], weights: dict[str, np.ndarray], opset: int = 23) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (2, 5, 6))],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (2, 5, 3))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def in_rows() -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", f"w{n}"], [n]) for n in "qkv"]
    nodes += [helper.make_node("Attention", list("qkv"), ["m"], q_num_heads=4, kv_num_heads=2)]
    nodes += [helper.make_node("MatMul", ["m", "wo"], ["y"])]
    weights = {"wq": normal(6, 16), "wk": normal(6, 8), "wv": normal(6, 8), "wo": normal(16, 3)}
    return projected_model(nodes, weights)


def in_heads() -> onnx.ModelProto:
    nodes = []
    for n in "qkv":
        nodes += [
            helper.make_node("MatMul", ["x", f"w{n}"], [f"{n}1"]),
            helper.make_node("Reshape", [f"{n}1", "s"], [f"{n}2"]),
        ]
        nodes += [helper.make_node("Transpose", [f"{n}2"], [n], perm=[0, 2, 1, 3])]
    nodes += [
        helper.make_node("Attention", list("qkv"), ["m"]),
        helper.make_node("Transpose", ["m"], ["t"], perm=[0, 2, 1, 3]),
    ]
    nodes += [helper.make_node("Reshape", ["t", "j"], ["r"]), helper.make_node("MatMul", ["r", "wo"], ["y"])]
    weights = {"wq": normal(6, 16), "wk": normal(6, 16), "wv": normal(6, 16), "wo": normal(16, 3)}
    return projected_model(nodes, {**weights, "s": np.array([2, 5, 4, 4]), "j": np.array([2, 5, 16])})


def joint() -> onnx.ModelProto:
    nodes = [helper.make_node("Attention", ["x", "w", "b"], ["m"], domain="com.microsoft", num_heads=4)]
    nodes += [helper.make_node("MatMul", ["m", "wo"], ["y"])]
    return projected_model(nodes, {"w": normal(6, 48), "b": normal(48), "wo": normal(16, 3)}, opset=17)


@pytest.mark.parametrize("make", [in_rows, in_heads, joint])
def test_a_cut_onnx_attention_keeps_its_scale(make: Any, tmp_path: Path) -> None:
    model = make()
    graph = load(model)
    keep = halves(graph)
    assert sorted(group.size for group in graph.groups() if group.free) in ([2, 2, 4, 4], [4, 4, 4])
    small = pruned(graph, keep)
    small.to_onnx(tmp_path / "small.onnx")
    x = normal(2, 5, 6)
    onnx.save(masked(model, graph, keep), tmp_path / "masked.onnx")
    expected = Session(tmp_path / "masked.onnx").run({"x": x})
    actual = Session(tmp_path / "small.onnx").run({"x": x})
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4)
