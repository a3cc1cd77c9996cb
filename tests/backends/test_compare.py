"""Comparing graphs, modules, ONNX files and functions with one another."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from regauge.backends.compare import check_equal, compare
from regauge.backends.run_onnxruntime import Session
from regauge.backends.run_torch import run_in_torch
from regauge.frontends.capture import capture
from regauge.ir.errors import EquivalenceError, RegaugeError
from regauge.ir.graph import Value
from regauge.ir.running.interpret import run
from small_graphs import multilayer_perceptron, residual_network


def onnx_file(model: nn.Module, path: Path) -> Path:
    torch.onnx.export(model, (torch.randn(2, 4),), path, dynamo=True, external_data=False, verbose=False)
    return path


def test_graph_and_function() -> None:
    graph = multilayer_perceptron(4, 8, 3)
    found = compare(graph, lambda x: run(graph, [x])[0] + 1e-3)
    assert found.absolute == pytest.approx(1e-3) and not found.equal(1e-6) and found.equal(1)
    assert "max abs" in str(found) and "1.00e-03" in str(found)


def test_graph_with_itself_over_several_seeds() -> None:
    graph = residual_network()
    found = compare(graph, graph.copy(), seeds=(0, 1, 2))
    assert found.runs == 3 and found.absolute == 0 and found.outputs[0].name == "logits"


def test_module_is_put_back_into_its_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert compare(model, model, torch.randn(3, 4)).absolute == 0
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_module_and_onnx_file_by_name_and_in_order(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    path = onnx_file(model, tmp_path / "model.onnx")
    assert compare(model, path, (torch.randn(2, 4),)).equal(1e-5)
    found = compare(path, str(path))
    assert found.absolute == 0, "inputs are made up from the file's own signature"
    assert [output.name for output in found.outputs] == Session(path).outputs


def test_shapes_and_counts_that_differ() -> None:
    found = compare(lambda x: (x, x), lambda x: x[:1], torch.ones(2, 3))
    assert not found.equal(1e9)
    assert found.outputs[0].note == "shapes differ: (2, 3) and (1, 3)"
    assert found.outputs[1].note == "only the first model has it"


def test_not_a_number_equals_itself_and_nothing_else() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert compare(lambda x: x, lambda x: x.clone(), nan).equal(0)
    assert not compare(lambda x: x, lambda x: x.nan_to_num(), nan).equal(1e9)


def test_check_equal_names_the_output() -> None:
    graph = multilayer_perceptron(4, 8, 3)
    with pytest.raises(EquivalenceError, match=f"output {graph.outputs[0].name} differs by"):  # type: ignore[union-attr]
        check_equal(graph, lambda x: run(graph, [x])[0] * 2)


def test_what_cannot_be_run_or_made_up() -> None:
    with pytest.raises(RegaugeError, match="a int cannot be run"):
        compare(3, 4, torch.ones(1))
    with pytest.raises(RegaugeError, match="no inputs are given"):
        compare(lambda x: x, lambda x: x)


def test_batches_are_taken_as_optimize_takes_them():
    model, x, y = nn.Linear(3, 2), torch.randn(1, 3), torch.randn(4, 3)
    for inputs, runs in [
        (x, 1), ((x,), 1), ([x], 1), ({"input": x}, 1),
        ([(x,), (y,)], 2), ([{"input": x}], 1), (iter([x, y]), 2), (lambda: [(x,), (y,), (x,)], 3),
    ]:  # fmt: skip
        found = compare(model, copy.deepcopy(model), inputs)
        assert found.runs == runs and found.absolute == 0


def test_wrong_inputs_are_told_in_one_line_without_their_elements():
    model, x = nn.Linear(3, 2), torch.randn(2, 3)
    graph = capture(model, (x,))
    for wrong in (((x, x),), (x, x), [], 5):
        for first in (model, graph):
            with pytest.raises(RegaugeError) as caught:
                compare(first, graph, wrong)
            assert len(str(caught.value).splitlines()) == 1 and "tensor(" not in str(caught.value)


class Mixed(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[int, torch.Tensor, None, torch.Tensor]:
        return 3, x + 1, None, torch.cat([x, x])


def test_results_that_are_no_tensors_move_no_names(tmp_path: Path) -> None:
    """The file has two outputs: they were held against the number and the first tensor."""
    model, x = Mixed(), torch.randn(2, 3)
    graph = capture(model, (x,))
    path = graph.to_onnx(tmp_path / "m.onnx")
    names = [output.name for output in graph.outputs if isinstance(output, Value)]
    assert Session(path).outputs == names
    for a, b in [(graph, path), (model, path), (path, graph)]:
        found = compare(a, b, x)
        assert found.equal(0) and [output.name for output in found.outputs] == names
    assert [output.name for output in compare(graph, model, x).outputs] == ["output_0", *names]
    assert list(run_in_torch(graph, (x,))) == names


def test_undefined_entries_of_both_are_told() -> None:
    found = compare(lambda x: x.log(), lambda x: x.log(), torch.tensor([1.0, -1.0, -2.0]))
    assert found.equal() and "both are NaN at 2 of 3 entries" in str(found)
