"""Cutting Dims: weights, shapes and size-valued attributes follow; what cannot be cut says why."""

import pytest
import torch

from regauge.ir.edit import Builder
from regauge.ir.errors import ExplainError, GraphError
from regauge.ir.graph import Graph
from regauge.ir.groups import find_group, free_groups
from regauge.ir.interpret import run
from regauge.ir.resize import resize
from regauge.ir.verify import verify


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
