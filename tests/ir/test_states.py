"""States that are inputs and outputs: declared, copied, printed, emitted."""

from pathlib import Path

import pytest
import sympy
import torch

import regauge
from regauge.ir.edit import Builder
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph
from regauge.ir.printing.parse import parse_graph
from regauge.ir.states import (
    Steps,
    carried,
    carry,
    first_states,
    ordinary_inputs,
    pair_states,
    take_states,
    with_first_states,
)
from regauge.ir.verify import verify


def running_sum() -> Graph:
    graph = Graph(name="running")
    build = Builder(graph)
    x = build.input("x", (2, 3), torch.float32)
    total = build.input("total", (2, 3), torch.float32)
    added = build.add(x, total)
    graph.outputs = [build.mul(added, 2)]
    carry(graph, total, added)
    return graph


def test_a_carried_state_is_handed_from_run_to_run() -> None:
    graph = running_sum()
    assert [value.name for value in ordinary_inputs(graph)] == ["x"]
    assert [output.name for output in graph.outputs] == ["mul", "total.next"]
    steps = Steps(graph)
    results = [steps(torch.full((2, 3), float(i)))[0][0, 0].item() for i in (1, 2, 3)]
    assert results == [2, 6, 12]


def test_a_run_that_begins_needs_no_states() -> None:
    graph, x = running_sum(), torch.ones(2, 3)
    for given in ((x,), {"x": x}):
        assert graph.run(with_first_states(graph, given))[0][0, 0] == 2
    for given in ((x, x), {"x": x, "total": x}, ()):
        assert with_first_states(graph, given) is given


def test_it_is_kept_by_copies_text_and_torch() -> None:
    graph = running_sum()
    copied = parse_graph(str(graph.copy()))
    verify(copied)
    (state,) = carried(copied)
    assert (state.before.name, state.after.name, state.returned) == ("total", "total.next", True)
    steps = Steps(graph, graph.to_torch())
    given = torch.ones(2, 3)
    assert torch.equal(first_states(graph, [given])[0], torch.zeros(2, 3))
    assert [float(steps(given)[0][0, 0]) for _ in range(3)] == [2, 4, 6]


def test_an_onnx_file_says_which_they_are(tmp_path: Path) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    running_sum().to_onnx(first)
    regauge.optimize(regauge.load(first), "simplify").to_onnx(second)
    for path in (first, second):
        steps = Steps(regauge.load(path))
        assert [float(steps(torch.ones(2, 3))[0][0, 0]) for _ in range(3)] == [2, 4, 6]


@pytest.mark.parametrize(
    "noted", ["", "{", "7", '["x"]', '[["x", 3]]', '[["x", "mul", "mul"]]', '[["y", "total.next"]]', '[["x", "z"]]']
)
def test_what_others_noted_as_states_is_none(noted: str) -> None:
    graph = running_sum()
    graph.states.clear()
    take_states(graph, noted)
    assert not graph.states
    take_states(graph, '[["total", "total.next"]]')
    assert [state.name for state in carried(graph)] == ["total"]


def test_what_cannot_be_carried_says_so() -> None:
    graph = running_sum()
    with pytest.raises(GraphError, match="needs a value of its own"):
        carry(graph, graph.inputs[1], graph.outputs[1])
    with pytest.raises(GraphError, match="is no input"):
        carry(graph, graph.outputs[0], graph.outputs[0])


def test_states_of_a_file_that_names_none_are_told_by_their_form() -> None:
    """The answer and the signal are none; sizes that come back dynamic are those of the signal, not empty caches."""
    graph = Graph(name="voice")
    build = Builder(graph)
    batch, other = (
        sympy.Symbol("batch", positive=True, integer=True),
        sympy.Symbol("other", positive=True, integer=True),
    )
    x = build.input("x", (batch, 3), torch.float32)
    rate = build.input("rate", (), torch.int64)
    h, c = (build.input(name, (2, other, 3), torch.float32) for name in "hc")
    grown = build.mul(build.unsqueeze(x, dim=0), torch.ones(2, 1, 1))
    graph.outputs = [build.mul(x, rate), build.add(grown, 1.0, name="hn"), build.mul(grown, 2.0, name="cn")]
    pair_states(graph)
    assert [(s.before, s.after.name) for s in carried(graph)] == [(h, "hn"), (c, "cn")]
    assert ordinary_inputs(graph) == [x, rate]
    assert [tuple(zeros.shape) for zeros in first_states(graph, [torch.zeros(5, 3), torch.tensor(8)])] == [
        (2, 5, 3)
    ] * 2
