"""Norms and softmax: what they average over may be cut, groups go as wholes, training writes running statistics."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn, rand, randn

from cutting import cut_all, free_sizes
from onnx_node import check_node, normal, operators
from regauge.frontends.capture import capture
from regauge.frontends.from_onnx import load
from regauge.ir.dims.resize import resize
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.ir.operator import get_operator
from regauge.ir.running.interpret import Interpreter, run


def network(*shape: int) -> tuple[Graph, Builder, Value]:
    graph = Graph()
    build = Builder(graph)
    return graph, build, build.input("x", shape, torch.float32)


def halved(graph: Graph) -> Graph:
    return resize(graph, {group.dim: range(group.size // 2) for group in graph.groups() if group.free})


def attributes(graph: Graph, op: str) -> dict[str, Any]:
    return next(node.attributes for node in graph.nodes if node.op == op)


# -- batch norm --------------------------------------------------------------------------------------------------------


def test_batch_norm_follows_its_channels_exactly() -> None:
    graph, build, x = network(2, 3, 5, 5)
    h = build.conv(x, build.parameter("a", randn(8, 3, 3, 3)))
    vectors = {name: build.parameter(name, tensor) for name, tensor in
               {"gain": randn(8), "shift": randn(8), "mean": randn(8), "var": rand(8) + 0.5}.items()}  # fmt: skip
    h = build.relu(build.batch_norm(h, *vectors.values()))
    graph.outputs = [build.conv(h, build.parameter("b", randn(4, 8, 1, 1)))]
    assert free_sizes(graph) == {"a:0": 8}
    small = halved(graph)
    assert [small.parameters[name].shape for name in vectors] == [(4,)] * 4


def test_batch_norm_in_training_returns_new_running_statistics() -> None:
    x, mean, var = randn(4, 3, 5), randn(3), rand(3) + 0.5
    layer = nn.BatchNorm1d(3)
    layer.running_mean, layer.running_var = mean.clone(), var.clone()
    before = mean.clone()
    y, new_mean, new_var = get_operator("batch_norm").evaluate(x, layer.weight, layer.bias, mean, var, training=True)
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(new_mean, layer.running_mean)
    torch.testing.assert_close(new_var, layer.running_var)
    assert torch.equal(mean, before)  # its operands are the user's own tensors


def test_weight_standardisation_normalises_the_weights_own_axes() -> None:
    """NFNet and ResNetV2 standardise each filter with a batch norm over the reshaped weight."""

    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(randn(8, 3, 3, 3))
            self.gain = nn.Parameter(randn(8))
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = nn.functional.batch_norm(
                self.weight.reshape(1, 8, -1), None, None, weight=self.gain, training=True, momentum=0.0
            )
            return self.last(nn.functional.conv2d(x, weight.reshape_as(self.weight)))

    graph = capture(Standardised().eval(), (randn(2, 3, 6, 6),))
    assert free_sizes(graph) == {"weight:0": 8}
    cut_all(graph, [randn(2, 3, 6, 6)])


# -- group, layer and weight norm --------------------------------------------------------------------------------------


def test_group_norm_frees_whole_groups_and_the_width_of_a_group() -> None:
    graph, build, x = network(2, 3, 5, 5)
    h = build.conv(x, build.parameter("a", randn(12, 3, 1, 1)))
    h = build.group_norm(h, build.parameter("gain", randn(12)), build.parameter("shift", randn(12)), num_groups=4)
    graph.outputs = [build.conv(h, build.parameter("b", randn(5, 12, 1, 1)))]
    assert free_sizes(graph) == {"a:0.0": 4, "a:0.1": 3}
    groups = {group.name: group.dim for group in graph.groups() if group.free}
    fewer = resize(graph, {groups["a:0.0"]: [0, 3]})
    assert attributes(fewer, "group_norm")["num_groups"] == 2
    assert fewer.parameters["gain"].shape == (6,)
    narrower = resize(graph, {groups["a:0.1"]: [1]})
    assert attributes(narrower, "group_norm")["num_groups"] == 4
    assert run(narrower, [randn(2, 3, 5, 5)])[0].shape == (2, 5, 5, 5)


def test_groups_of_one_channel_and_one_group_of_all() -> None:
    for groups, free in ((1, {"a:0": 6}), (6, {"a:0": 6})):
        graph, build, x = network(2, 3, 5)
        h = build.group_norm(build.conv(x, build.parameter("a", randn(6, 3, 1))), num_groups=groups)
        graph.outputs = [build.conv(h, build.parameter("b", randn(5, 6, 1)))]
        assert free_sizes(graph) == free
        assert attributes(halved(graph), "group_norm")["num_groups"] == (1 if groups == 1 else 3)


def test_layer_norm_size_follows_the_width() -> None:
    graph, build, x = network(2, 3)
    h = build.linear(x, build.parameter("a", randn(8, 3)))
    h = build.layer_norm(h, build.parameter("gain", randn(8)), None, normalized_shape=(8,))
    graph.outputs = [build.linear(h, build.parameter("b", randn(4, 8)))]
    small = halved(graph)
    assert attributes(small, "layer_norm")["normalized_shape"] == (4,)
    assert run(small, [randn(2, 3)])[0].shape == (2, 4)


def test_weight_norm_keeps_its_rows_free() -> None:
    graph, build, x = network(2, 3)
    weight = build.weight_norm(build.parameter("v", randn(8, 3)), build.parameter("g", randn(8, 1)), dim=0)
    graph.outputs = [build.linear(build.relu(build.linear(x, weight)), build.parameter("b", randn(4, 8)))]
    assert free_sizes(graph) == {"v:0": 8}
    assert halved(graph).parameters["g"].shape == (4, 1)


def test_one_length_for_the_whole_weight() -> None:
    """``weight_norm(dim=None)`` reaches ATen as -1, which is not the last axis."""
    v, g = randn(4, 3), randn(())
    wanted = v * (g / v.norm())
    torch.testing.assert_close(get_operator("weight_norm").evaluate(v, g, dim=-1), wanted)


LAYERS = {
    "batch": nn.BatchNorm2d(4), "batch without statistics": nn.BatchNorm2d(4, track_running_stats=False),
    "instance": nn.InstanceNorm2d(4), "affine instance": nn.InstanceNorm2d(4, affine=True),
    "instance with statistics": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "group": nn.GroupNorm(2, 4), "local response": nn.LocalResponseNorm(3), "rms": nn.RMSNorm(6),
    "layer": nn.LayerNorm((6, 6), bias=False), "plain layer": nn.LayerNorm(6, elementwise_affine=False),
    "softmax": nn.Softmax(1), "log softmax": nn.LogSoftmax(-1),
    "weight norm": torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 1), dim=None),
    "parametrized weight norm": torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_torch_layers_are_read_by_records_and_compute_the_same(name: str) -> None:
    layer, x = LAYERS[name].eval(), randn(2, 4, 6, 6)
    graph = capture(layer, (x,))
    assert "torch_call" not in operators(graph)
    torch.testing.assert_close(run(graph, [x])[0], layer(x).detach())


@pytest.mark.parametrize("name", ["batch", "affine instance", "group", "layer", "plain layer", "rms", "softmax"])
def test_the_layer_text_is_the_layer(name: str) -> None:
    layer = LAYERS[name].eval()
    node = capture(layer, (randn(2, 4, 6, 6),)).nodes[-1]
    assert node.operator.layer is not None
    assert repr(eval(node.operator.layer(node) or "", {"nn": nn})) == repr(layer)


# -- softmax -----------------------------------------------------------------------------------------------------------


def test_softmax_over_an_axis_that_is_cut_sees_what_is_left() -> None:
    graph, build, x = network(2, 3)
    h = build.softmax(build.linear(x, build.parameter("a", randn(8, 3))), dim=-1)
    graph.outputs = [build.linear(h, build.parameter("b", randn(4, 8)))]
    assert free_sizes(graph) == {"a:0": 8}
    assert ("normalise", 8) in [(role, e.size) for role, e in graph.axes.calls[h.producer].roles]  # type: ignore


# -- ONNX --------------------------------------------------------------------------------------------------------------

X = normal(2, 4, 6, 7)
TOKENS = normal(2, 5, 8)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_onnx_softmax_before_opset_13_joins_the_axes_from_its_own_on(op: str) -> None:
    assert "reshape" in operators(check_node(op, [X], opset=11))
    assert "reshape" in operators(check_node(op, [X], opset=11, axis=2))
    assert "reshape" not in operators(check_node(op, [X], opset=11, axis=-1))
    assert "reshape" not in operators(check_node(op, [normal(2, 5, 1, 1)], opset=11))
    assert "reshape" not in operators(check_node(op, [X], opset=13, axis=1))
    check_node(op, [X], opset=13)


def test_onnx_batch_and_instance_norm() -> None:
    statistics = [normal(4), normal(4), normal(4), np.abs(normal(4)) + 0.1]
    for opset in (9, 15):
        check_node("BatchNormalization", [X, *statistics], opset=opset, constants={1, 2, 3, 4}, epsilon=1e-3)
    check_node("InstanceNormalization", [X, normal(4), normal(4)], constants={1, 2})


def test_an_onnx_batch_norm_by_computed_statistics_has_gradients_to_them() -> None:
    """TensorFlow writes layer norms so; with data ``prune`` needs the gradients of what lies before."""
    statistics = [normal(4), normal(4), normal(4), np.abs(normal(4)) + 0.1]
    graph = check_node("BatchNormalization", [X, *statistics], constants={1, 2}, epsilon=1e-3)
    assert [node.op for node in graph.nodes] == ["batch_norm"]
    mean, var = (torch.tensor(array, requires_grad=True) for array in statistics[2:])
    interpreter = Interpreter(graph)
    environment, bindings = interpreter.bound([torch.tensor(X), mean, var])
    (y,) = interpreter.run_node(graph.nodes[0], environment, bindings)
    torch.testing.assert_close(y.detach(), graph.run([torch.tensor(X), mean.detach(), var.detach()])[0])
    shift, scale = torch.autograd.grad(y.square().sum(), [mean, var])
    assert bool(shift.all()) and bool(scale.all())


@pytest.mark.parametrize(
    ("op", "inputs", "options"),
    [
        ("LayerNormalization", [X, normal(7), normal(7)], {}),
        ("LayerNormalization", [X, normal(6, 7)], {"axis": 2}),
        ("LayerNormalization", [X, normal(7), normal(7)], {"results": 3}),
        ("LayerNormalization", [X, normal(1, 7), normal(7)], {}),
        ("GroupNormalization", [X, normal(2), normal(2)], {"opset": 18, "num_groups": 2}),
        ("GroupNormalization", [X, normal(4), normal(4)], {"opset": 21, "num_groups": 2}),
        ("RMSNormalization", [X, normal(7)], {"opset": 23}),
        ("SimplifiedLayerNormalization", [TOKENS, normal(8)], {}),
        ("SkipLayerNormalization", [TOKENS, TOKENS, normal(8), normal(8), normal(8)], {"domain": "com.microsoft"}),
        ("SkipLayerNormalization", [TOKENS, TOKENS, normal(8)], {"domain": "com.microsoft"}),
        ("SkipSimplifiedLayerNormalization", [TOKENS, TOKENS, normal(8), normal(8)], {"domain": "com.microsoft"}),
        ("LRN", [X], {"size": 5, "alpha": 0.01}),
        ("LpNormalization", [X], {"axis": 1, "p": 1}),
        ("LpNormalization", [np.array([[3, 4], [0, 0]], np.float32)], {}),  # zeros stay zeros
        ("MeanVarianceNormalization", [X], {}),
    ],
)
def test_onnx_norms(op: str, inputs: list[np.ndarray], options: dict[str, Any]) -> None:
    assert "onnx_call" not in operators(check_node(op, inputs, **options))


NORMS = {
    "layer": "h = LayerNormalization <axis = -1> (t, gain)",
    "rms": "h = SimplifiedLayerNormalization <axis = -1> (t, gain)",
    "old softmax": "h = Softmax (t)",
}


@pytest.mark.parametrize("name", ["layer", "rms", "old softmax"])
def test_a_cut_norm_is_written_back(name: str, tmp_path: Path) -> None:
    opset = 12 if name == "old softmax" else 17
    text = f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    norm (float[batch, 5, 6] x) => (float[batch, 5, 4] y) {{
      t = MatMul (x, a)
      {NORMS[name]}
      y = MatMul (h, b)
    }}
    """
    weights = {"a": (6, 8), "b": (8, 4)} | ({} if name == "old softmax" else {"gain": (8,)})
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(normal(*shape), key) for key, shape in weights.items())
    graph = load(model)
    assert free_sizes(graph) == {"a:1": 8}
    small = halved(graph)
    small.to_onnx(tmp_path / "small.onnx")
    feed = {"x": normal(3, 5, 6)}
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    expected = run(small, [torch.from_numpy(feed["x"])])[0]
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [18, 21])
def test_the_number_of_groups_is_written_back(opset: int, tmp_path: Path) -> None:
    text = f"""
    <ir_version: 10, opset_import: ["" : {opset}]>
    norm (float[batch, 3, 4, 4] x) => (float[batch, 5, 4, 4] y) {{
      t = Conv (x, a)
      h = GroupNormalization <num_groups = 4> (t, gain, shift)
      y = Conv (h, b)
    }}
    """
    width = 4 if opset == 18 else 8
    weights = {"a": (8, 3, 1, 1), "b": (5, 8, 1, 1), "gain": (width,), "shift": (width,)}
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(normal(*shape), key) for key, shape in weights.items())
    graph = load(model)
    assert sorted(free_sizes(graph).values()) == [2, 4]
    small = halved(graph)
    small.to_onnx(tmp_path / "small.onnx")
    written = onnx.load(tmp_path / "small.onnx")
    assert [a.i for node in written.graph.node for a in node.attribute if a.name == "num_groups"] == [2]
    assert operators(load(written)).count("group_norm") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_norm_without_epsilon_takes_that_of_the_type_it_computes_in(dtype: torch.dtype, tmp_path: Path) -> None:
    """torch computes half precision in single; entries are so small that the epsilon decides."""
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 4), dtype)
    graph.outputs = [build.rms_norm(x, normalized_shape=(4,))]
    numbers = torch.full((2, 4), 1e-3, dtype=dtype)
    graph.to_onnx(tmp_path / "norm.onnx")
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "norm.onnx")).run(None, {"x": numbers.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), nn.functional.rms_norm(numbers, (4,)), rtol=4e-3, atol=0)
