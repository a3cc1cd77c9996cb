"""Recurrent layers: values against torch and onnxruntime; the hidden Dim is cut in every gate, layer and direction."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn, randn

from cutting import cut_all, free_sizes
from onnx_models import halves, masked, pruned
from onnx_node import check_node, normal, operators
from regauge.backends.run_onnxruntime import Session
from regauge.frontends.capture import capture
from regauge.frontends.from_onnx import load
from regauge.ir.cost import figures
from regauge.ir.errors import RegaugeWarning
from regauge.ir.graph import Graph

# -- torch -------------------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, layer: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.layer = layer(6, 4, **options)
        self.last = nn.Linear(4 * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.layer(self.first(x))[0])
        return result


LAYERS = [(nn.LSTM, "lstm"), (nn.GRU, "gru"), (nn.RNN, "rnn")]


@pytest.mark.parametrize(("layer", "name"), LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "batch_first": True},
        {"bidirectional": True, "num_layers": 3},
        {"bias": False, "bidirectional": True},
    ],
)
def test_layers_are_captured_and_cut(layer: type[nn.Module], name: str, options: dict[str, Any]) -> None:
    x = randn(2, 3, 5)
    graph = capture(Tagger(layer, **options), (x,))
    assert name in operators(graph)
    assert sorted(free_sizes(graph).values()) == [4, 6]
    cut_all(graph, [x])


@pytest.mark.parametrize(("layer", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_every_matrix_counts_once_per_step(layer: type[nn.Module], gates: int) -> None:
    graph = capture(Tagger(layer, num_layers=2), (randn(7, 2, 5),))
    assert figures(graph).macs == 7 * 2 * (5 * 6 + gates * (6 * 4 + 3 * 4 * 4) + 4 * 3)


@pytest.mark.parametrize(("layer", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_every_matrix_of_a_cell_counts_once(layer: type[nn.Module], gates: int) -> None:
    graph = capture(layer(6, 4), (randn(2, 6),))
    assert figures(graph).macs == 2 * gates * (6 * 4 + 4 * 4)


def test_layers_with_states_of_their_own_have_hidden_dims_of_their_own() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.LSTM(5, 6), nn.GRU(6, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.last(self.second(self.first(x)[0])[0])
            return result

    graph = capture(Stack(), (randn(2, 3, 5),))
    assert free_sizes(graph) == {"first.weight_ih_l0:0.1": 6, "second.weight_ih_l0:0.1": 4}
    cut_all(graph, [randn(2, 3, 5)])


def test_the_gates_are_pinned() -> None:
    graph = capture(Tagger(nn.LSTM), (randn(2, 3, 5),))
    gates = graph.axes.axes(graph.parameters["layer.weight_hh_l0"])[0]
    assert str(gates) == "(layer.weight_hh_l0:0.0=4! layer.weight_ih_l0:0.1=4)"


def test_the_rectified_layer_and_last_states() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.RNN(5, 4, 2, nonlinearity="relu"), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.last(self.layer(x, h)[1][-1])
            return result

    graph = capture(Last(), (randn(2, 3, 5), randn(2, 3, 4)))
    assert graph.nodes[0].attributes["nonlinearity"] == "relu"
    assert free_sizes(graph) == {}, "the state is an input of the graph"


class Steps(nn.Module):
    """A cell in a loop, from a learnt state."""

    def __init__(self, cell: type[nn.Module], pair: bool) -> None:
        super().__init__()
        self.cell, self.last, self.pair = cell(5, 4), nn.Linear(4, 3), pair
        self.state = nn.Parameter(randn(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state: Any = (self.state, self.state) if self.pair else self.state
        for step in x:
            state = self.cell(step, state)
        result: torch.Tensor = self.last(state[0] if self.pair else state)
        return result


@pytest.mark.parametrize(("cell", "pair"), [(nn.LSTMCell, True), (nn.GRUCell, False), (nn.RNNCell, False)])
def test_cells(cell: type[nn.Module], pair: bool) -> None:
    graph = capture(Steps(cell, pair), (randn(3, 2, 5),))
    assert "torch_call" not in operators(graph)
    assert list(free_sizes(graph).values()) == [4]
    cut_all(graph, [randn(3, 2, 5)])


@pytest.mark.filterwarnings("ignore")
def test_a_projected_state_is_kept_as_it_is() -> None:
    graph = capture(nn.LSTM(5, 4, proj_size=2), (randn(2, 3, 5),))
    assert "torch_call" in operators(graph)


def test_dynamic_batches_and_lengths() -> None:
    tagger = Tagger(nn.LSTM, bidirectional=True, num_layers=2)
    graph = capture(tagger, (randn(4, 3, 5),), dynamic={"x": {0: "time", 1: "batch"}})
    assert sorted(free_sizes(graph).values()) == [4, 6]
    cut_all(graph, [randn(7, 2, 5)])


# -- ONNX forms against onnxruntime ------------------------------------------------------------------------------------


def recurrent(
    op: str, gates: int, *, direction: str = "forward", states: tuple[bool, ...] = (), lengths: Any = None,
    bias: bool = True, **options: Any,
) -> Graph:  # fmt: skip
    p = 2 if direction == "bidirectional" else 1
    inputs = [normal(4, 2, 5), normal(p, gates * 3, 5), normal(p, gates * 3, 3)]
    inputs += [normal(p, 2 * gates * 3) if bias else None, lengths]
    inputs += [normal(p, 2, 3) if given else None for given in states]
    while inputs[-1] is None:
        inputs.pop()
    results = 3 if op == "LSTM" else 2
    fixed = [1, 2] + [3] * bias
    return check_node(op, inputs, constants=fixed, results=results, direction=direction, hidden_size=3, **options)


SHORT = np.array([2, 4], dtype=np.int32)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_onnx_layers(op: str, gates: int, direction: str) -> None:
    given = (True,) * (2 if op == "LSTM" else 1)
    assert operators(recurrent(op, gates, direction=direction)) == [f"onnx_{op.lower()}"]
    recurrent(op, gates, direction=direction, states=given)
    recurrent(op, gates, direction=direction, states=given, lengths=SHORT)
    recurrent(op, gates, direction=direction, lengths=SHORT, bias=False)
    recurrent(op, gates, direction=direction, bias=False)
    if op == "GRU":
        recurrent(op, gates, direction=direction, states=given, linear_before_reset=1)
        recurrent(op, gates, direction=direction, lengths=SHORT, linear_before_reset=1)
    if op == "RNN":
        activations = ["Relu"] * (2 if direction == "bidirectional" else 1)
        recurrent(op, gates, direction=direction, activations=activations)


def test_what_has_no_rule_is_kept_as_it_is() -> None:
    with pytest.warns(RegaugeWarning, match="clip"):
        assert operators(recurrent("LSTM", 4, clip=0.5)) == ["onnx_call"]
    with pytest.warns(RegaugeWarning, match="activations"):
        assert operators(recurrent("GRU", 3, activations=["Tanh", "Tanh"])) == ["onnx_call"]
    with pytest.warns(RegaugeWarning, match="peepholes"):
        inputs = [normal(4, 2, 5), normal(1, 12, 5), normal(1, 12, 3), *[None] * 4, normal(1, 9)]
        check_node("LSTM", inputs, constants=[1, 2, 7], results=3, hidden_size=3)


def layer_model(op: str, gates: int, direction: str) -> onnx.ModelProto:
    p = 2 if direction == "bidirectional" else 1
    names = ["y", "h"] + ["c"] * (op == "LSTM")
    nodes = [
        helper.make_node(op, ["x", "w", "r", "b"], names, direction=direction, hidden_size=6),
        helper.make_node("Transpose", ["y"], ["t"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["t", "s"], ["f"]),
        helper.make_node("MatMul", ["f", "o"], ["z"]),
    ]
    weights = {"w": normal(p, gates * 6, 5), "r": normal(p, gates * 6, 6), "b": normal(p, gates * 12)}
    weights |= {"o": normal(p * 6, 3), "s": np.array([0, 0, -1])}
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ("time", "batch", 5))],
        [helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ("time", "batch", 3))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_cut_layer_is_written_back(op: str, gates: int, direction: str, tmp_path: Path) -> None:
    model = layer_model(op, gates, direction)
    graph = load(model)
    assert list(free_sizes(graph).values()) == [6]
    keep = halves(graph)
    pruned(graph, keep).to_onnx(tmp_path / "small.onnx")
    onnx.save(masked(model, graph, keep), tmp_path / "masked.onnx")
    x = normal(4, 2, 5)
    expected = Session(tmp_path / "masked.onnx").run({"x": x})
    actual = Session(tmp_path / "small.onnx").run({"x": x})
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_initial_states_of_zeros_do_not_tie_layers(tmp_path: Path) -> None:
    """Exporters give the same zeros to every layer; each has a hidden Dim of its own, and is written without them."""
    weights = {"w0": normal(1, 24, 5), "r0": normal(1, 24, 6), "w1": normal(1, 24, 6), "r1": normal(1, 24, 6)}
    weights |= {"zeros": np.zeros((1, 2, 6), np.float32), "o": normal(6, 3), "one": np.array([1])}
    nodes = []
    for i, source in enumerate(["x", "s0"]):
        nodes.append(
            helper.make_node("LSTM", [source, f"w{i}", f"r{i}", "", "", "zeros", "zeros"], [f"y{i}"], hidden_size=6)
        )
        nodes.append(helper.make_node("Squeeze", [f"y{i}", "one"], [f"s{i}"]))
    nodes.append(helper.make_node("MatMul", ["s1", "o"], ["z"]))
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, (4, 2, size)) for n, size in (("x", 5), ("z", 3))]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    body = helper.make_graph(nodes, "layers", ends[:1], ends[1:], tensors)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    graph = load(model)
    assert list(free_sizes(graph).values()) == [6, 6]
    keep = halves(graph)
    pruned(graph, keep).to_onnx(tmp_path / "small.onnx")
    x = normal(4, 2, 5)
    expected = Session(masked(model, graph, keep)).run({"x": x})
    torch.testing.assert_close(Session(tmp_path / "small.onnx").run({"x": x}), expected, rtol=1e-4, atol=1e-4)
