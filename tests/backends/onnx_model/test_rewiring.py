"""Passes that rewrite loaded ONNX graphs: what they add, take out and connect differently is in the written file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from onnx import numpy_helper

from onnx_models import NETWORK, NETWORK_WEIGHTS, PERCEPTRON, PERCEPTRON_WEIGHTS, model_of
from onnx_oracle import runtime_outputs
from regauge.frontends.from_onnx import load
from regauge.ir.edit import Builder, remove_dead, remove_node, replace_uses, set_input
from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph, Node, Value
from regauge.ir.running.interpret import run


def written(graph: Graph, path: Path, feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Write the graph, and hold onnxruntime to the interpreter; gives the model back."""
    model = onnx.load(graph.to_onnx(path / "written.onnx"))
    onnx.checker.check_model(model, full_check=True)
    expected = run(graph, [torch.from_numpy(feeds[value.name]) for value in graph.inputs if value.name in feeds])
    for ours, theirs in zip(runtime_outputs(model, feeds), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(np.asarray(ours)), theirs, rtol=1e-4, atol=1e-4)
    again = run(load(model), [torch.from_numpy(feeds[value.name]) for value in graph.inputs if value.name in feeds])
    for read, theirs in zip(again, expected, strict=True):
        torch.testing.assert_close(read, theirs, rtol=1e-4, atol=1e-4)
    return model


def op_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def the(graph: Graph, op: str) -> Node:
    return next(node for _, node in graph.walk() if node.op == op)


def in_place_of(graph: Graph, node: Node, build: Callable[[Builder, Value], Value]) -> Value:
    """Replace a node by what ``build`` makes of its first operand."""
    builder = Builder(graph, by="test")
    with builder.at(node):
        made = build(builder, node.inputs[0])  # type: ignore[arg-type]
    replace_uses(graph, node.output, made)
    remove_node(graph, node)
    return made


FEEDS = {"x": normal(3, 6), "unused": normal(2)}
IMAGES = {"x": normal(2, 3, 8, 8)}


def test_a_linear_layer_is_added(tmp_path: Path) -> None:
    graph = load(model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)).copy()

    def layer(build: Builder, x: Value) -> Value:
        weight, bias = build.parameter("extra.weight", torch.randn(8, 8)), build.parameter("extra.bias", torch.randn(8))
        return build.linear(x, weight, bias)  # type: ignore[no-any-return]

    in_place_of(graph, the(graph, "relu"), layer)
    model = written(graph, tmp_path, FEEDS)
    assert op_types(model) == ["Gemm", "Gemm", "Gemm"]
    assert [i.name for i in model.graph.initializer] == ["w1", "b1", "w2", "b2", "extra.weight", "extra.bias"]
    assert [node.op for node in load(model).nodes] == ["linear"] * 3


def test_new_nodes_stay_in_the_module_that_they_were_built_in(tmp_path: Path) -> None:
    model = model_of(PERCEPTRON.replace("ir_version: 8", "ir_version: 10"), PERCEPTRON_WEIGHTS)
    for node, (path, kind) in zip(
        model.graph.node, (("fc1", "Linear"), ("act", "it's ReLU"), ("fc2", "Linear")), strict=True
    ):
        scopes = {"name_scopes": ["", path, "node"], "class_hierarchy": ["m.Net", kind, "aten.op"]}
        for key, entries in scopes.items():
            node.metadata_props.add(key=f"pkg.torch.onnx.{key}", value=str(entries))
    graph = load(model).copy()
    made = in_place_of(graph, the(graph, "relu"), lambda build, x: build.mul(build.sigmoid(x), x))
    assert made.producer is not None and made.producer.scope == (("", "Net"), ("act", "it's ReLU"))
    wanted = {node.name: node.scope for node in graph.nodes}
    again = load(written(graph, tmp_path, FEEDS))
    assert {node.name: node.scope for node in again.nodes} == wanted
    assert [path for node in again.nodes for path, _ in node.scope[1:]] == ["fc1", "act", "act", "fc2"]


def test_no_places_are_noted_in_a_file_that_tells_none(tmp_path: Path) -> None:
    graph = load(model_of(PERCEPTRON.replace("ir_version: 8", "ir_version: 10"), PERCEPTRON_WEIGHTS)).copy()
    made = in_place_of(graph, the(graph, "relu"), lambda build, x: build.mul(build.sigmoid(x), x))
    assert made.producer is not None
    made.producer.scope = (("", ""), ("fc1", "Linear"))  # as the names of weights may have it
    model = written(graph, tmp_path, FEEDS)
    assert not any("torch" in note.key for node in model.graph.node for note in node.metadata_props)


def test_factors_take_the_place_of_a_layer_and_its_weight_goes(tmp_path: Path) -> None:
    graph = load(model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)).copy()
    first = the(graph, "linear")
    left, right = (torch.randn(8, 2), torch.randn(2, 6))
    bias = first.inputs[2]

    def factors(build: Builder, x: Value) -> Value:
        inner = build.linear(x, build.parameter("w1.right", right))
        return build.linear(inner, build.parameter("w1.left", left), bias)  # type: ignore[no-any-return]

    in_place_of(graph, first, factors)
    model = written(graph, tmp_path, FEEDS)
    assert op_types(model) == ["Gemm", "Gemm", "Relu", "Gemm"]
    assert "w1" not in {i.name for i in model.graph.initializer}


def test_a_batch_norm_is_folded_into_a_convolution_that_had_no_bias(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    folded (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y) {
      h = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k)
      m = BatchNormalization (h, gain, shift, mean, var)
      y = Relu (m)
    }
    """
    weights = {"k": (4, 3, 3, 3), "gain": (4,), "shift": (4,), "mean": (4,), "var": (4,)}
    model = model_of(text, weights)
    (variance,) = [i for i in model.graph.initializer if i.name == "var"]
    variance.CopyFrom(numpy_helper.from_array(np.abs(numpy_helper.to_array(variance)), "var"))
    graph = load(model)
    expected = runtime_outputs(model, IMAGES)[0]
    graph = graph.copy()
    norm, conv = the(graph, "batch_norm"), the(graph, "conv")
    gain, shift, mean, var = (operand.tensor for operand in norm.inputs[1:])  # type: ignore[union-attr]
    scale = gain * (var + norm.attributes["eps"]) ** -0.5
    build = Builder(graph, by="fold")
    kernel = build.parameter("k.folded", conv.inputs[1].tensor * scale[:, None, None, None])  # type: ignore[union-attr]
    with build.at(conv):
        y = build.conv(conv.inputs[0], kernel, build.parameter("bias", shift - mean * scale), **conv.attributes)
    replace_uses(graph, norm.output, y)
    remove_dead(graph)
    small = written(graph, tmp_path, IMAGES)
    assert op_types(small) == ["Conv", "Relu"] and len(small.graph.initializer) == 2
    np.testing.assert_allclose(runtime_outputs(small, IMAGES)[0], expected, rtol=1e-4, atol=1e-4)


def test_what_is_left_of_an_onnx_node_is_spelled_anew(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    scaled (float[n, 6] x) => (float[n, 3] y) { h = Gemm <alpha = 2.0> (x, w, b)  y = Relu (h) }
    """
    graph = load(model_of(text, {"w": (6, 3), "b": (3,)})).copy()
    assert [node.op for node in graph.nodes] == ["matmul", "mul", "add", "relu"]
    mul = the(graph, "mul")
    replace_uses(graph, mul.output, mul.inputs[0])
    remove_node(graph, mul)
    model = written(graph, tmp_path, {"x": normal(3, 6)})
    assert op_types(model) == ["Gemm", "Relu"] and not model.graph.node[0].attribute


def test_a_value_inside_an_onnx_node_may_be_read(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    scaled (float[n, 6] x) => (float[n, 3] y) { h = Gemm <alpha = 2.0> (x, w, b)  y = Relu (h) }
    """
    graph = load(model_of(text, {"w": (6, 3), "b": (3,)})).copy()
    relu, product = the(graph, "relu"), the(graph, "matmul")
    set_input(relu, 0, Builder(graph).add(relu.inputs[0], product.output), graph)
    assert sorted(op_types(written(graph, tmp_path, {"x": normal(3, 6)}))) == ["Add", "Add", "MatMul", "Mul", "Relu"]


def test_an_operand_that_was_absent_is_given(tmp_path: Path) -> None:
    graph = load(model_of(NETWORK, NETWORK_WEIGHTS)).copy()
    grouped = [node for node in graph.nodes if node.op == "conv"][1]
    grouped.inputs = (*grouped.inputs, None)
    set_input(grouped, 2, Builder(graph).parameter("bias", torch.randn(8)), graph)
    model = written(graph, tmp_path, IMAGES)
    assert [len(node.input) for node in model.graph.node if node.op_type == "Conv"] == [3, 3]


def test_a_changed_attribute_is_written(tmp_path: Path) -> None:
    graph = load(model_of(NETWORK, NETWORK_WEIGHTS)).copy()
    conv = the(graph, "conv")
    conv.attributes.update(dilation=(2, 2), padding=(2, 2))
    graph.version += 1
    model = written(graph, tmp_path, IMAGES)
    (dilations,) = [a.ints for a in model.graph.node[0].attribute if a.name == "dilations"]
    assert list(dilations) == [2, 2]


def test_one_of_two_equal_operands_is_replaced(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    twice (float[n, 6] x) => (float[n, 6] y) { h = Relu (x)  y = Sub (h, h) }
    """
    graph = load(model_of(text, {})).copy()
    sub = the(graph, "sub")
    set_input(sub, 1, Builder(graph).tanh(sub.inputs[1]), graph)
    assert op_types(written(graph, tmp_path, {"x": normal(3, 6)})) == ["Relu", "Tanh", "Sub"]


def test_a_node_may_take_over_the_name_of_another(tmp_path: Path) -> None:
    graph = load(model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)).copy()
    relu = the(graph, "relu")
    x, users = relu.inputs[0], list(relu.output.uses)
    name = relu.name
    for node, slot in users:
        set_input(node, slot, x, graph)
    remove_node(graph, relu)
    made = Builder(graph)("gelu", x, name=name)
    for node, slot in users:
        set_input(node, slot, made, graph)
    assert made.name == name
    assert "Relu" not in op_types(written(graph, tmp_path, FEEDS))


BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
branches (float[n, 4] x, bool flag) => (float[n, 6] y) {
  h = MatMul (x, w)
  y = If (flag) <
    then_branch = g1 () => (float[n, 6] a) { s = Sigmoid (h)  a = Relu (s) },
    else_branch = g2 () => (float[n, 6] b) { b = Neg (h) }
  >
}
"""


@pytest.mark.parametrize("flag", [True, False])
def test_nodes_in_branches_are_replaced(tmp_path: Path, flag: bool) -> None:
    graph = load(model_of(BRANCHES, {"w": (4, 6)})).copy()
    for owner, node in list(graph.walk()):
        if node.op in ("relu", "neg"):
            build = Builder(owner, by="test")
            build._taken |= {value.name for value in graph.values()}
            weight = build.parameter(f"{node.op}.gain", torch.randn(6))
            replace_uses(owner, node.output, build.mul(build.silu(node.inputs[0]), weight))
            remove_node(owner, node)
    model = written(graph, tmp_path, {"x": normal(3, 4), "flag": np.array(flag)})
    bodies = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
    assert [[n.op_type for n in body.node] for body in bodies] == [
        ["Sigmoid", "Sigmoid", "Mul", "Mul"], ["Sigmoid", "Mul", "Mul"],
    ]  # fmt: skip
    names = [n.name for body in (model.graph, *bodies) for n in body.node if n.name]
    assert len(names) == len(set(names))


def test_dynamic_sizes_are_computed_in_the_file(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    tokens (float[n, t, 6] x) => (float[n, t, 6] y) { h = Relu (x)  y = Neg (h) }
    """
    graph = load(model_of(text, {})).copy()

    def apart(build: Builder, x: Value) -> Value:
        n, t, _ = x.shape
        flat = build.reshape(x, shape=(n * t, 6))
        moved = build.expand(build.unsqueeze(flat, dim=0), shape=(2, n * t, 6))
        return build.reshape(build.mean(moved, dims=(0,)), shape=(n, t, 6))  # type: ignore[no-any-return]

    in_place_of(graph, the(graph, "relu"), apart)
    for sizes in ((2, 5), (3, 1)):
        written(graph, tmp_path, {"x": normal(*sizes, 6)})


def test_what_the_opset_lacks_is_refused_by_name(tmp_path: Path) -> None:
    graph = load(model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)).copy()
    in_place_of(graph, the(graph, "relu"), lambda build, x: build.erfinv(x))
    with pytest.raises(EmitError, match="erfinv.*added by test.*has no spelling there yet"):
        graph.to_onnx(tmp_path / "refused.onnx")
    graph = load(model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)).copy()
    in_place_of(graph, the(graph, "relu"), lambda build, x: build.round(x, decimals=2))
    with pytest.raises(EmitError, match="cannot be written to ONNX: Round has no attribute decimals in opset 17"):
        graph.to_onnx(tmp_path / "refused.onnx")
    assert not list(tmp_path.iterdir())
