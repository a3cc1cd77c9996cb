"""If, Loop, Scan, sequences and local functions: same results as onnxruntime, and weights inside bodies are groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from onnx_oracle import assert_equals_runtime, free_sizes, opaque, runtime_outputs
from regauge.frontends.from_onnx import load
from regauge.ir.dims.groups import free_groups
from regauge.ir.dims.resize import resize
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run

FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64


def value(name: str, kind: int, shape: list[Any] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def floats(**shapes: tuple[int, ...]) -> list[onnx.TensorProto]:
    generator = np.random.default_rng(0)
    return [
        numpy_helper.from_array(generator.standard_normal(s).astype(np.float32), name) for name, s in shapes.items()
    ]


def body(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[onnx.TensorProto] | None = None,
) -> onnx.GraphProto:
    return helper.make_graph(nodes, "body", inputs, outputs, weights or [])


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[onnx.TensorProto],
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    graph = helper.make_graph(nodes, "main", inputs, outputs, weights)
    made = helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions or [])
    onnx.checker.check_model(made)
    return made


def halved(graph: Graph) -> Graph:
    return resize(graph, {group.dim: range(group.size // 2) for group in free_groups(graph)})


def branching() -> onnx.ModelProto:
    then = body([helper.make_node("MatMul", ["h", "a"], ["ya"])], [], [value("ya", FLOAT, None)], floats(a=(8, 6)))
    nodes = [helper.make_node("Relu", ["h"], ["r"]), helper.make_node("MatMul", ["r", "b"], ["yb"])]
    other = body(nodes, [], [value("yb", FLOAT, None)], floats(b=(8, 6)))
    return model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
            helper.make_node("MatMul", ["y", "v"], ["z"]),
        ],
        [value("x", FLOAT, ["n", 4]), value("c", BOOL, [])],
        [value("z", FLOAT, ["n", 3])],
        floats(w=(4, 8), v=(6, 3)),
    )


def test_if_ties_the_axes_of_both_branches() -> None:
    for condition in (True, False):
        graph = assert_equals_runtime(branching(), given={"c": np.array(condition)})
    assert free_sizes(graph) == [8, 6]
    members = {str(member) for group in free_groups(graph) for member in group.members}
    assert members == {"w:1", "a:0", "b:0", "a:1", "b:1", "v:0"}


def test_pruning_through_an_if_equals_masking() -> None:
    graph = assert_equals_runtime(branching())
    small = halved(graph)
    kept = {"w": (4, 4), "a": (4, 3), "b": (4, 3), "v": (3, 3)}
    assert {p.name: p.shape for p in small.all_parameters()} == kept
    masked = {p.name: torch.zeros(p.shape) for p in graph.all_parameters()}  # type: ignore[arg-type]
    for parameter in small.all_parameters():
        rows, columns = kept[parameter.name]
        masked[parameter.name][:rows, :columns] = parameter.tensor
    x = torch.randn(5, 4)
    for condition in (torch.tensor(True), torch.tensor(False)):
        torch.testing.assert_close(run(small, [x, condition]), run(graph, [x, condition], weights=masked))


def test_a_branch_on_a_known_rank_is_read_in_place() -> None:
    then = body([helper.make_node("Identity", ["x"], ["same"])], [], [value("same", FLOAT, None)])
    axis = helper.make_node("Constant", [], ["axis"], value_ints=[0])
    other = body([axis, helper.make_node("Unsqueeze", ["x", "axis"], ["more"])], [], [value("more", FLOAT, None)])
    proto = model(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Size", ["shape"], ["rank"]),
            helper.make_node("Equal", ["rank", "two"], ["flat"]),
            helper.make_node("If", ["flat"], ["y"], then_branch=then, else_branch=other),
            helper.make_node("MatMul", ["y", "w"], ["z"]),
        ],
        [value("x", FLOAT, ["n", 4])],
        [value("z", FLOAT, ["n", 3])],
        [*floats(w=(4, 3)), numpy_helper.from_array(np.array(2), "two")],
    )
    graph = assert_equals_runtime(proto)
    assert [node.op for node in graph.nodes][-1] == "matmul"
    assert list(graph.metadata["onnx_branches"].values()) == [0]


def looping(step: list[onnx.NodeProto], rows: bool) -> onnx.ModelProto:
    """``h0 = x u``, then the step three times; results ``h v``, and with ``rows`` every step's ``h v`` too."""
    outputs = [value("going_on", BOOL, []), value("h_next", FLOAT, None)]
    nodes = [*step, helper.make_node("Identity", ["going"], ["going_on"])]
    if rows:
        nodes.append(helper.make_node("Identity", ["h_next"], ["row"]))
        outputs.append(value("row", FLOAT, None))
    inner = body(nodes, [value("i", INT64, []), value("going", BOOL, []), value("h", FLOAT, None)], outputs)
    results = ["last", "every"] if rows else ["last"]
    after = [helper.make_node("MatMul", [name, "v"], [f"{name}_v"]) for name in results]
    shapes = {"last": ["m", 3], "every": ["t", "n", 3]}
    return model(
        [
            helper.make_node("MatMul", ["x", "u"], ["h0"]),
            helper.make_node("Loop", ["three", "", "h0"], results, body=inner),
            *after,
        ],
        [value("x", FLOAT, ["n", 4])],
        [value(f"{name}_v", FLOAT, shapes[name]) for name in results],
        [*floats(u=(4, 8), w=(8, 8), v=(8, 3)), numpy_helper.from_array(np.array(3), "three")],
    )


def test_loop_carries_axes_from_one_iteration_to_the_next() -> None:
    step = [helper.make_node("MatMul", ["h", "w"], ["a"]), helper.make_node("Tanh", ["a"], ["h_next"])]
    graph = assert_equals_runtime(looping(step, rows=True))
    assert free_sizes(graph) == [8]
    (group,) = free_groups(graph)
    assert {str(member) for member in group.members} == {"u:1", "w:0", "w:1", "v:0"}
    assert [tuple(r.shape) for r in run(halved(graph), [torch.randn(2, 4)])] == [(2, 3), (3, 2, 3)]


def test_loop_whose_carried_value_grows() -> None:
    step = [helper.make_node("Concat", ["h", "h0"], ["h_next"], axis=0)]
    graph = assert_equals_runtime(looping(step, rows=False), tolerance=1e-4)
    assert free_sizes(graph) == [8]
    assert graph.axes.problems == []


def test_scan() -> None:
    inner = body(
        [
            helper.make_node("MatMul", ["s", "w"], ["a"]),
            helper.make_node("Add", ["a", "entry"], ["b"]),
            helper.make_node("Tanh", ["b"], ["s_next"]),
            helper.make_node("Identity", ["s_next"], ["row"]),
        ],
        [value("s", FLOAT, None), value("entry", FLOAT, None)],
        [value("s_next", FLOAT, None), value("row", FLOAT, None)],
    )
    scan = helper.make_node(
        "Scan",
        ["start", "xs"],
        ["last", "rows"],
        body=inner,
        num_scan_inputs=1,
        scan_input_axes=[1],
        scan_output_axes=[1],
        scan_input_directions=[1],
    )
    nodes = [helper.make_node("MatMul", ["x", "u"], ["xs"]), scan, helper.make_node("MatMul", ["rows", "v"], ["z"])]
    proto = model(
        nodes,
        [value("x", FLOAT, [2, "t", 4])],
        [value("z", FLOAT, [2, "t", 3])],
        floats(u=(4, 8), w=(8, 8), v=(8, 3), start=(2, 8)),
    )
    assert free_sizes(assert_equals_runtime(proto)) == [8]


def recurrent() -> onnx.ModelProto:
    """A scan and a loop one after the other, whose bodies declare the sizes of all that they take and give."""
    step = body(
        [
            helper.make_node("MatMul", ["s", "w"], ["a"]),
            helper.make_node("Add", ["a", "entry"], ["s_next"]),
            helper.make_node("Tanh", ["s_next"], ["row"]),
        ],
        [value("s", FLOAT, ["n", 8]), value("entry", FLOAT, ["n", 8])],
        [value("s_next", FLOAT, ["n", 8]), value("row", FLOAT, ["n", 8])],
    )
    turn = body(
        [
            helper.make_node("MatMul", ["h", "m"], ["b"]),
            helper.make_node("Tanh", ["b"], ["h_next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        [value("i", INT64, []), value("go", BOOL, []), value("h", FLOAT, ["t", "n", 8])],
        [value("go_on", BOOL, []), value("h_next", FLOAT, ["t", "n", 8])],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "u"], ["xs"]),
        helper.make_node("Gather", ["xs", "first"], ["start"]),
        helper.make_node("Scan", ["start", "xs"], ["last", "rows"], body=step, num_scan_inputs=1),
        helper.make_node("Loop", ["three", "", "rows"], ["turned"], body=turn),
        helper.make_node("MatMul", ["turned", "v"], ["z"]),
    ]
    numbers = [numpy_helper.from_array(np.array(n), name) for name, n in (("first", 0), ("three", 3))]
    weights = [*floats(u=(4, 8), w=(8, 8), m=(8, 8), v=(8, 3)), *numbers]
    return model(nodes, [value("x", FLOAT, ["t", "n", 4])], [value("z", FLOAT, ["t", "n", 3])], weights)


def test_what_bodies_declare_follows_a_cut(tmp_path: Path) -> None:
    """The old sizes stayed, which no runtime loads; and the torch source had a syntax error."""
    graph = load(recurrent())
    assert free_sizes(graph) == [8]
    small = halved(graph)
    x = torch.randn(5, 2, 4)
    (wanted,) = small.run((x,))
    small.to_onnx(tmp_path / "small.onnx")
    np.testing.assert_allclose(runtime_outputs(tmp_path / "small.onnx", {"x": x.numpy()})[0], wanted, atol=1e-6)
    torch.testing.assert_close(small.to_torch()(x), wanted)
    declared = onnx.load(tmp_path / "small.onnx").graph.node[2].attribute[0].g
    assert [d.dim_value for v in (*declared.input, *declared.output) for d in v.type.tensor_type.shape.dim[1:]] == [
        4
    ] * 4


def test_sequences_of_known_length_are_splits() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("SplitToSequence", ["h", "four"], ["parts"], axis=1),
        helper.make_node("SequenceAt", ["parts", "one"], ["right"]),
        helper.make_node("SequenceAt", ["parts", "zero"], ["left"]),
        helper.make_node("Mul", ["left", "right"], ["m"]),
        helper.make_node("MatMul", ["m", "v"], ["z"]),
    ]
    numbers = [numpy_helper.from_array(np.array(n), name) for name, n in (("zero", 0), ("one", 1), ("four", 4))]
    weights = [*floats(w=(5, 8), v=(4, 3)), *numbers]
    graph = assert_equals_runtime(model(nodes, [value("x", FLOAT, ["n", 5])], [value("z", FLOAT, ["n", 3])], weights))
    assert free_sizes(graph) == [4]
    assert [node.op for node in graph.nodes] == ["matmul", "split", "mul", "matmul"]
    assert opaque(graph) == []


def function(name: str, inputs: list[str], nodes: list[onnx.NodeProto], attributes: list[str]) -> onnx.FunctionProto:
    return helper.make_function("local", name, inputs, ["Y"], nodes, [helper.make_opsetid("", 18)], attributes)


def test_local_functions_are_expanded_and_their_bodies_stay() -> None:
    leaky = helper.make_node("LeakyRelu", ["h"], ["r"])
    reference = leaky.attribute.add()
    reference.name, reference.ref_attr_name, reference.type = "alpha", "slope", onnx.AttributeProto.FLOAT
    layer = [helper.make_node("MatMul", ["X", "A"], ["h"]), leaky, helper.make_node("MatMul", ["r", "B"], ["Y"])]
    heads = [
        helper.make_node("MatMul", ["X", "A"], ["h"]),
        helper.make_node("Constant", [], ["s"], value_ints=[0, 2, 4]),
        helper.make_node("Reshape", ["h", "s"], ["Y"]),
    ]
    functions = [function("Layer", ["X", "A", "B"], layer, ["slope"]), function("Heads", ["X", "A"], heads, [])]
    proto = model(
        [
            helper.make_node("Layer", ["x", "a", "b"], ["h"], domain="local", slope=0.3),
            helper.make_node("Layer", ["h", "c", "d"], ["k"], domain="local", slope=0.1),
            helper.make_node("Heads", ["k", "q"], ["p"], domain="local"),
            helper.make_node("ReduceSum", ["p", "last"], ["z"]),
        ],
        [value("x", FLOAT, ["n", 4])],
        [value("z", FLOAT, ["n", 2, 1])],
        [
            *floats(a=(4, 8), b=(8, 6), c=(6, 10), d=(10, 5), q=(5, 8)),
            numpy_helper.from_array(np.array([2]), "last"),
        ],
        functions,
    )
    graph = assert_equals_runtime(proto)
    assert free_sizes(graph) == [10, 8, 6, 5]
    assert all(node.origin in list(graph.metadata["onnx"].graph) for node in graph.nodes)
    pins = [str(pin) for group in graph.groups() if not group.free for pin in group.pins]
    assert any("written inside the local function Heads" in pin for pin in pins)
