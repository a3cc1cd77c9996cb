"""Cutting Dims: weights, shapes and size-valued attributes follow; what cannot be cut says why."""

import pytest
import torch

from regauge.ir.dims.extents import Dim
from regauge.ir.dims.groups import find_group, free_groups
from regauge.ir.dims.resize import resize
from regauge.ir.edit import Builder
from regauge.ir.errors import ExplainError, GraphError
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.ir.verify import verify
from small_graphs import multilayer_perceptron, residual_network


def grouped() -> Graph:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2, 8, 6, 6), torch.float32)
    h = build.conv(x, build.parameter("a", torch.randn(16, 8, 3, 3)), padding=(1, 1))
    h = build.conv(h, build.parameter("b", torch.randn(12, 4, 1, 1)), groups=4)
    h = build.reshape(h, shape=(2, 12 * 36))
    graph.outputs = [build.linear(h, build.parameter("c", torch.randn(5, 12 * 36)))]
    return graph


def test_every_free_dim_of_a_grouped_convolution_can_be_cut_at_once() -> None:
    graph = grouped()
    small = resize(graph, {group.dim: range(1, int(group.size)) for group in free_groups(graph)})
    assert {name: list(p.shape) for name, p in small.parameters.items()} == {
        "a": [9, 8, 3, 3],  # groups 4 -> 3, channels of a group 4 -> 3
        "b": [6, 3, 1, 1],  # outputs of a group 3 -> 2
        "c": [5, 6 * 36],
    }
    assert small.nodes[1].attributes["groups"] == 3
    assert small.nodes[2].attributes["shape"] == (2, 6 * 36)
    verify(small, axes=True)
    assert run(small, [torch.randn(2, 8, 6, 6)])[0].shape == (2, 5)
    assert [edit.by for edit in small.history] == ["resize"] * 3


def test_the_input_graph_is_not_changed() -> None:
    graph = grouped()
    before, text = graph.parameters["a"].tensor, str(graph)
    resize(graph, {"b:0.1": [0]})
    assert str(graph) == text and graph.parameters["a"].tensor is before


def test_pinned_dims_are_refused_with_their_reason() -> None:
    with pytest.raises(GraphError, match=r"c:0 cannot be cut: it is an axis of a graph output \(linear\)"):
        resize(grouped(), {"c:0": [0, 1]})


@pytest.mark.parametrize("indices", [[], [3], [-1]])
def test_selections_outside_the_dim_are_refused(indices: list[int]) -> None:
    with pytest.raises(GraphError, match="keep at least one of them, and no other"):
        resize(grouped(), {"b:0.1": indices})


def test_a_number_of_indices_is_refused() -> None:
    with pytest.raises(GraphError, match=r"c:0 keeps indices.* range\(4\)"):
        resize(grouped(), {"c:0": 4})  # type: ignore[dict-item]


def test_an_unknown_dim_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ExplainError, match="did you mean"):
        find_group(grouped(), "b:0.7")
    with pytest.raises(ExplainError, match="has several Dims: name one of"):
        find_group(grouped(), "a:0")


def test_explain_gives_reasons_and_roles() -> None:
    graph = grouped()
    assert "is pinned: none of its indices can be removed" in graph.explain("c:0")
    text = graph.explain("a:0.1")
    assert "is free" in text and "in a:0, b:1" in text and "contracted by conv_1 = conv" in text
    assert "(a:0.0=4 a:0.1=4)" in graph.explain("a:0")
    assert "computed by conv_1 = conv" in graph.explain("conv_1")


def test_dims_of_values_can_be_cut() -> None:
    graph = residual_network(16)
    hidden = next(node for node in graph.nodes if node.op == "relu").output
    batch, (channels,), *_ = graph.dims(hidden)
    assert [dim.size for dim in batch] == [hidden.shape[0]] and channels.name == "stem.weight:0"
    assert graph.dims(hidden.name) == graph.dims(hidden)
    assert resize(graph, {channels: range(4)}).find("stem.weight").shape == (4, 3, 3, 3)


def test_bound_dims_stand_for_what_they_are_bound_to() -> None:
    graph = residual_network(16)
    weight = graph.parameters["block0.first.weight"]
    given = graph.axes.of[weight][1]
    assert isinstance(given, Dim) and given.bound is not None
    assert resize(graph, {given: range(8)}).find("stem.weight").shape == (8, 3, 3, 3)


def test_refined_dims_and_dims_of_other_graphs_are_refused_by_name() -> None:
    graph = Graph("grouped")
    build = Builder(graph)
    x = build.input("x", (1, 8, 5), torch.float64)
    h = build.conv(x, build.parameter("w", torch.randn(8, 8, 1, dtype=torch.float64)))
    graph.outputs = [build.group_norm(h, num_groups=2)]
    refined = graph.axes.of[graph.parameters["w"]][0]
    assert isinstance(refined, Dim)
    with pytest.raises(GraphError, match=r"of size 8 is \(w:0.0=2! w:0.1=4!\) by now: cut w:0.0 and w:0.1"):
        resize(graph, {refined: range(4)})
    foreign = graph.copy().groups()[0].dim
    with pytest.raises(GraphError, match="is no Dim of graph 'grouped': copies have their own"):
        resize(graph, {foreign: range(1)})
    with pytest.raises(GraphError, match="is no value of graph 'grouped'"):
        graph.dims(graph.copy().parameters["w"])


def test_a_graph_runs_with_a_hook() -> None:
    graph = multilayer_perceptron(4, 8, 3)
    seen = []
    (result,) = graph.run(torch.ones(4, 4, dtype=torch.float64), hook=lambda node, results: seen.append(node.op))
    assert seen == ["linear", "relu", "linear"] and result.shape == (4, 3)
    (zero,) = graph.run({"x": torch.ones(4, 4, dtype=torch.float64)}, hook=lambda node, results: (results[0] * 0,))
    assert not zero.any()
