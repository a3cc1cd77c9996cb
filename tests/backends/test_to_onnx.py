"""Graphs loaded from ONNX, pruned and written again: onnxruntime is the judge, the masked original the standard."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import numpy_helper

import regauge
from onnx_models import (
    ATTENTION,
    ATTENTION_WEIGHTS,
    NETWORK,
    NETWORK_WEIGHTS,
    PERCEPTRON,
    PERCEPTRON_WEIGHTS,
    halves,
    masked,
    model_of,
    pruned,
)
from regauge.backends.onnx_model.check import coarsest
from regauge.backends.run_onnxruntime import Session
from regauge.frontends.from_onnx import load
from regauge.ir.errors import EmitError

MODELS = {
    "perceptron": (PERCEPTRON, PERCEPTRON_WEIGHTS),
    "network": (NETWORK, NETWORK_WEIGHTS),
    "attention": (ATTENTION, ATTENTION_WEIGHTS),
}


def inputs_of(model: onnx.ModelProto, batch: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for value in model.graph.input:
        shape = [d.dim_value or batch + i for i, d in enumerate(value.type.tensor_type.shape.dim)]
        found[value.name] = torch.randn(shape, generator=generator)
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimisation", ["off", "all"])
def test_pruned_file_equals_the_masked_original(name: str, optimisation: str, tmp_path: Path) -> None:
    model = model_of(*MODELS[name])
    graph = load(model)
    keep = halves(graph)
    assert keep
    path = pruned(graph, keep).to_onnx(tmp_path / "pruned.onnx")
    small = onnx.load(path)
    onnx.checker.check_model(small, full_check=True)
    assert sum(len(i.raw_data) for i in small.graph.initializer) < sum(len(i.raw_data) for i in model.graph.initializer)
    for batch in (1, 3):
        inputs = inputs_of(model, batch)
        expected = Session(masked(model, graph, keep), optimisation=optimisation).run(inputs)
        found = Session(path, optimisation=optimisation).run(inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_shape_arithmetic_that_still_holds_is_left_alone(tmp_path: Path) -> None:
    graph = load(model_of(ATTENTION, ATTENTION_WEIGHTS))
    head_dims = [g for g in graph.groups() if g.free and g.size == 4]
    assert head_dims
    path = pruned(graph, {group.dim: range(2) for group in head_dims}).to_onnx(tmp_path / "pruned.onnx")
    nodes = {node.output[0]: node for node in onnx.load(path).graph.node}
    # Two Reshapes split a width that is still three times the head dim: their computed targets are right as they are.
    assert nodes["q4"].input[1] == "split"
    # The square root of the head dim is a number of its own: it must not follow the cut.
    assert nodes["scaled"].input[1] != "scale" and "scale" not in nodes


def test_heads_are_cut_where_the_target_counts_them(tmp_path: Path) -> None:
    model = model_of(ATTENTION, ATTENTION_WEIGHTS)
    graph = load(model)
    heads = [g for g in graph.groups() if g.free and g.size == 3]
    keep = {group.dim: range(0, 3, 2) for group in heads}
    assert keep
    path = pruned(graph, keep).to_onnx(tmp_path / "pruned.onnx")
    inputs = inputs_of(model)
    expected = Session(masked(model, graph, keep), optimisation="off").run(inputs)
    torch.testing.assert_close(Session(path).run(inputs), expected, rtol=1e-4, atol=1e-4)


def test_untouched_nodes_names_and_declarations_stay(tmp_path: Path) -> None:
    model = onnx_ir.to_proto(onnx_ir.from_proto(model_of(NETWORK, NETWORK_WEIGHTS)))
    small = onnx.load(pruned(load(model)).to_onnx(tmp_path / "pruned.onnx"))
    assert small.graph.input == model.graph.input and small.graph.output == model.graph.output
    assert small.ir_version == model.ir_version and small.opset_import == model.opset_import
    assert [i.name for i in small.graph.initializer] == [i.name for i in model.graph.initializer]
    before = {node.output[0]: node for node in model.graph.node}
    after = {node.output[0]: node for node in small.graph.node}
    for name in ("c1", "r1", "s", "p", "y"):
        assert after[name] == before[name]
    assert set(before) - set(after) == {"shape"}
    noted = {entry.key: entry.value for entry in small.metadata_props}
    assert noted["regauge.passes"] == "prune" and set(noted) == {"regauge.passes", "regauge.version"}


def test_declared_shapes_inside_follow_the_cut(tmp_path: Path) -> None:
    small = onnx.load(pruned(load(model_of(PERCEPTRON, PERCEPTRON_WEIGHTS))).to_onnx(tmp_path / "pruned.onnx"))
    (hidden,) = [v for v in small.graph.value_info if v.name == "h"]
    dims = hidden.type.tensor_type.shape.dim
    assert dims[0].dim_param == "batch" and dims[1].dim_value == 4


def test_weights_in_constant_nodes_and_branches_are_cut(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    branches (float[n, 4] x, bool flag) => (float[n, 2] y) {
      h = MatMul (x, w)
      y = If (flag) <
        then_branch = g1 () => (float[n, 2] a) <float[6, 2] v = {1,2,3,4,5,6,7,8,9,10,11,12}> { a = MatMul (h, v) },
        else_branch = g2 () => (float[n, 2] b) { u = Constant <value = float[6, 2] {1,-2,3,-4,5,-6,7,-8,9,-1,2,-3}> ()
          b = MatMul (h, u) }
      >
    }
    """
    model = model_of(text, {"w": (4, 6)})
    graph = load(model)
    keep = halves(graph)
    assert [dim.size for dim in keep] == [6]
    path = pruned(graph, keep).to_onnx(tmp_path / "pruned.onnx")
    for flag in (True, False):
        inputs = {"x": torch.randn(3, 4), "flag": torch.tensor(flag)}
        expected = Session(masked(model, graph, keep), optimisation="off").run(inputs)
        torch.testing.assert_close(Session(path, optimisation="off").run(inputs), expected)


def assert_masked(model: onnx.ModelProto, tmp_path: Path) -> onnx.ModelProto:
    """Cut all that is free and hold the file to the masked original; gives the file back."""
    graph = load(model)
    keep = halves(graph)
    assert keep
    path = pruned(graph, keep).to_onnx(tmp_path / "pruned.onnx")
    inputs = inputs_of(model)
    weights = {i.name for i in model.graph.initializer}
    inputs = {name: tensor for name, tensor in inputs.items() if name not in weights}
    expected = Session(masked(model, graph, keep), optimisation="off").run(inputs)
    torch.testing.assert_close(Session(path, optimisation="off").run(inputs), expected, rtol=1e-4, atol=1e-4)
    return onnx.load(path)


def test_nodes_that_did_nothing_do_nothing_on_the_cut_input(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    idle (float[n, 4] x) => (float[n, 2] y) {
      h = MatMul (x, w)
      target = Constant <value = int64[2] {1, 6}> ()
      same = Expand (h, target)
      zero = Constant <value = int64[1] {0}> ()
      six = Constant <value = int64[1] {6}> ()
      one = Constant <value = int64[1] {1}> ()
      whole = Slice (same, zero, six, one)
      y = MatMul (whole, v)
    }
    """
    assert_masked(model_of(text, {"w": (4, 6), "v": (6, 2)}), tmp_path)


def test_numbers_counted_from_sizes_stay_what_they_were(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    counted (float[n, 4] x) => (float[n, 2] y) {
      h = MatMul (x, w)
      shape = Shape (h)
      one = Constant <value = int64 {1}> ()
      width = Gather (shape, one)
      number = Cast <to = 1> (width)
      scaled = Div (h, number)
      half = Sqrt (number)
      again = Mul (half, scaled)
      y = MatMul (again, v)
    }
    """
    assert_masked(model_of(text, {"w": (4, 6), "v": (6, 2)}), tmp_path)


def test_weights_that_are_declared_as_inputs_follow_the_cut(tmp_path: Path) -> None:
    text = """
    <ir_version: 3, opset_import: ["" : 9]>
    old (float[n, 4] x, float[4, 6] w, float[6, 2] v) => (float[n, 2] y) {
      h = MatMul (x, w)
      y = MatMul (h, v)
    }
    """
    written = assert_masked(model_of(text, {"w": (4, 6), "v": (6, 2)}), tmp_path)
    declared = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in written.graph.input}
    assert declared == {"x": [0, 4], "w": [4, 3], "v": [3, 2]}


def test_weights_that_callers_may_override_are_left_alone(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    open (float[n, 4] x, float[4, 6] w) => (float[n, 2] y) { h = MatMul (x, w)  r = MatMul (h, u)  y = MatMul (r, v) }
    """
    model = model_of(text, {"w": (4, 6), "u": (6, 6), "v": (6, 2)})
    written = assert_masked(model, tmp_path)
    assert {i.name: list(i.dims) for i in written.graph.initializer} == {"w": [4, 6], "u": [6, 3], "v": [3, 2]}


def test_functions_are_kept_and_their_operands_cut(tmp_path: Path) -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    calls (float[n, 4] x) => (float[n, 2] y) {
      h = local.layer (x, w)
      y = local.layer (h, v)
    }
    <domain: "local", opset_import: ["" : 17]>
    layer (a, weight) => (c) { b = MatMul (a, weight)  c = Relu (b) }
    """
    model = model_of(text, {"w": (4, 6), "v": (6, 2)})
    written = assert_masked(model, tmp_path)
    assert [f.name for f in written.functions] == ["layer"]
    assert [n.op_type for n in written.graph.node] == ["layer", "layer"]


def test_added_nodes_are_written(tmp_path: Path) -> None:
    from regauge.ir.edit import Builder, replace_uses, set_input

    graph = load(model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)).copy()
    relu = next(node for node in graph.nodes if node.op == "relu")
    build = Builder(graph, by="double")
    doubled = build.add(relu.output, relu.output)
    for node, slot in list(relu.output.uses):
        if node is not doubled.producer:
            set_input(node, slot, doubled, graph)
    last = graph.outputs[0]
    replaced = build.tanh(last)
    replace_uses(graph, last, replaced)
    set_input(replaced.producer, 0, last, graph)
    path = graph.to_onnx(tmp_path / "added.onnx")
    written = onnx.load(path)
    assert [o.name for o in written.graph.output] == ["y"]
    assert sorted(n.op_type for n in written.graph.node) == ["Add", "Gemm", "Gemm", "Relu", "Tanh"]


@pytest.mark.parametrize("declares", [True, False])
def test_shapes_of_added_results_are_declared_where_the_file_declares_some(declares: bool, tmp_path: Path) -> None:
    from regauge.ir.edit import Builder, replace_uses, set_input

    text = PERCEPTRON if declares else PERCEPTRON.replace("<float[batch, 8] h> {", "{")
    graph = load(model_of(text, PERCEPTRON_WEIGHTS)).copy()
    hidden = next(node for node in graph.nodes if node.op == "relu").output
    bent = Builder(graph, by="bend").tanh(hidden, name="bent")
    replace_uses(graph, hidden, bent)
    set_input(bent.producer, 0, hidden, graph)
    written = onnx.load(graph.to_onnx(tmp_path / "bent.onnx"))
    assert [info.name for info in written.graph.value_info] == (["h", "bent"] if declares else [])


def test_a_wrong_file_is_refused_and_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if an operator were spelled wrongly: the finished file is run, and is not what was asked for."""
    from regauge.backends.onnx_model import rewiring as onnx_rewiring

    small = pruned(load(model_of(PERCEPTRON, PERCEPTRON_WEIGHTS)))
    relu = next(node for node in small.nodes if node.op == "relu")
    relu.op = "neg"
    monkeypatch.setattr(onnx_rewiring, "spell", lambda onnx: (onnx.Abs(onnx.operand(0)),))
    with pytest.raises(EmitError):
        small.to_onnx(tmp_path / "wrong.onnx")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    small.to_onnx(tmp_path / "right.onnx")


def test_half_precision_weights_keep_their_type(tmp_path: Path) -> None:
    text = PERCEPTRON.replace("float[", "float16[")
    model = onnx.parser.parse_model(text)
    for name, shape in PERCEPTRON_WEIGHTS.items():
        array = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    small = onnx.load(pruned(load(model)).to_onnx(tmp_path / "half.onnx"))
    assert {i.data_type for i in small.graph.initializer} == {onnx.TensorProto.FLOAT16}


def test_half_precision_on_the_way_may_be_as_far_off_as_in_the_end() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
    graph = regauge.capture(model, (torch.randn(2, 8),))
    assert coarsest(graph) == 0
    assert coarsest(regauge.optimize(graph, "scalify{dtype=float16}")) == 0.02
