"""Values keep the names that they have in the file, also where those are names of operators, as in torch's exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
import torch

import regauge
from onnx_models import model_of
from regauge.cli import main
from regauge.frontends.from_onnx import load
from regauge.ir.graph import Graph
from regauge.ir.verify import verify

EXPORTED = """
<ir_version: 10, opset_import: ["" : 20]>
exported (float[batch, 4] mul) => (float[batch, 4] add, float[batch, 4] mul_2) {
  linear = Gemm <transB = 1> (mul, linear_2, b)
  gelu = Gelu (linear)
  linear_1 = Gemm <transB = 1, alpha = 0.5> (gelu, v, mul_1)
  add = Add (linear_1, mul)
  mul_2 = Identity (add)
}
"""
EXPORTED_WEIGHTS = {"linear_2": (8, 4), "b": (8,), "v": (4, 8), "mul_1": (4,)}

NESTED = """
<ir_version: 8, opset_import: ["" : 17]>
nested (float[n, 4] x, bool c) => (float[n, 4] relu, float[n, 4] loop) {
  sigmoid = Sigmoid (x)
  cond = If (c) <
    then_branch = t () => (float[n, 4] tanh) { relu_1 = Relu (sigmoid)  tanh = Tanh (relu_1) },
    else_branch = e () => (float[n, 4] sqrt) { abs = Abs (sigmoid)  sqrt = Sqrt (abs) }
  >
  relu = Relu (cond)
  three = Constant <value = int64 {3}> ()
  yes = Constant <value = bool {1}> ()
  loop = Loop (three, yes, relu) <
    body = b (int64 i, bool going, float[n, 4] add) => (bool going_on, float[n, 4] add_2) {
      going_on = Identity (going)
      add_1 = Add (add, w)
      add_2 = Add (add_1, sigmoid)
    }
  >
}
"""


def pairs(graph: Graph) -> list[tuple[str, str]]:
    """The names in the file and in the graph of what inputs, weights and nodes give; not of captured values."""
    nested = [value for _, node in graph.walk() for value in node.outputs]
    bodies = [value for _, node in graph.walk() if node.op == "loop" for value in node.regions[0].inputs[:3]]
    values = [*graph.inputs, *graph.all_parameters(), *nested, *bodies]
    return [(v.origin.name or "", v.name) for v in values if isinstance(v.origin, onnx_ir.Value)]


def test_names_of_operators_stay() -> None:
    graph = load(model_of(EXPORTED, EXPORTED_WEIGHTS))
    found = pairs(graph)
    assert {"mul", "linear_2", "mul_1", "linear", "gelu", "linear_1", "add"} <= {name for name, _ in found}
    assert [ours for _, ours in found] == [theirs for theirs, _ in found]
    names = [value.name for value in graph.values()]
    assert len(set(names)) == len(names)
    verify(graph)


def test_names_in_nested_graphs_stay() -> None:
    graph = load(model_of(NESTED, {"w": (4,)}))
    found = pairs(graph)
    assert {"cond", "tanh", "relu_1", "abs", "sqrt", "loop", "add", "add_1", "add_2"} <= {name for name, _ in found}
    assert [ours for _, ours in found] == [theirs for theirs, _ in found]
    verify(graph)


def test_a_loop_that_is_read_twice_keeps_its_names() -> None:
    text = NESTED.replace("add_2 = Add (add_1, sigmoid)", "add_2 = Concat <axis = 0> (add_1, sigmoid)")
    text = text.replace("float[n, 4] add)", "float[m, 4] add)").replace("float[n, 4] add_2", "float[k, 4] add_2")
    found = pairs(load(model_of(text.replace("float[n, 4] loop", "float[k, 4] loop"), {"w": (4,)})))
    assert [ours for _, ours in found] == [theirs for theirs, _ in found]
    assert {"add", "add_1", "add_2"} <= {name for name, _ in found}


def test_a_name_of_two_branches_is_made_unique() -> None:
    graph = load(
        model_of(NESTED.replace("sqrt", "tanh").replace("tanh = Tanh (abs)", "tanh = Sqrt (abs)"), {"w": (4,)})
    )
    (then, other) = next(node for node in graph.nodes if node.op == "cond").regions
    assert [r.outputs[0].name for r in (then, other)] == ["tanh", "tanh_2"]  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("names") / "exported.onnx"
    onnx.save(model_of(EXPORTED, EXPORTED_WEIGHTS), path)
    return path


def test_explain_answers_about_the_node_of_the_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, weight in (("linear", "linear_2"), ("linear_1", "v")):
        assert main(["explain", str(file), name]) == 0
        shown = capsys.readouterr().out
        assert f"%{name}" in shown.splitlines()[0], shown
        assert weight in shown


def test_results_are_saved_under_the_names_of_outputs(file: Path, tmp_path: Path) -> None:
    assert main(["run", str(file), "-o", str(tmp_path / "out.npz")]) == 0
    assert np.load(tmp_path / "out.npz").files == ["add", "mul_2"]
    again = load(regauge.optimize(load(file), "fuse").to_onnx(tmp_path / "again.onnx"))
    report = regauge.compare(again, file, {"mul": torch.ones(2, 4)})
    assert [output.name for output in report.outputs] == ["add", "mul_2"]
