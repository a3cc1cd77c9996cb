"""Structural verification names every fault."""

import pytest
import torch

from regauge.ir.edit import Builder, remove_dead, remove_node, replace_uses, set_input
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph, Value
from regauge.ir.running.interpret import run
from regauge.ir.verify import verify


def chain(length: int = 3) -> Graph:
    graph = Graph("chain")
    build = Builder(graph)
    value = build.input("x", (2, 4), torch.float32)
    for index in range(length):
        value = build.linear(value, build.parameter(f"w{index}", torch.randn(4, 4)))
    graph.outputs = [value]
    return graph


def test_a_good_graph_passes() -> None:
    verify(chain(), axes=True)


def test_a_cycle_is_found() -> None:
    graph = chain()
    set_input(graph.nodes[0], 0, graph.nodes[-1].output, graph)
    with pytest.raises(GraphError, match="depends on its own result: the graph has a cycle"):
        verify(graph)


def test_duplicate_names_are_found() -> None:
    graph = chain()
    graph.nodes[1].output.name = graph.nodes[0].output.name
    with pytest.raises(GraphError, match="two values are called %linear"):
        verify(graph)


def test_a_foreign_value_is_found() -> None:
    graph = chain()
    set_input(graph.nodes[1], 0, Value(name="stray", shape=(2, 4), dtype=torch.float32), graph)
    with pytest.raises(GraphError, match="reads %stray: f32\\[2,4\\], which is not defined"):
        verify(graph)


def test_a_wrong_attribute_is_found() -> None:
    graph = chain()
    graph.nodes[0].attributes["axis"] = 3
    with pytest.raises(GraphError, match="linear has no attribute 'axis'"):
        verify(graph)


def test_data_of_another_shape_is_found() -> None:
    graph = chain()
    graph.parameters["w0"].shape = (4, 5)
    with pytest.raises(GraphError, match="'w0' has the shape \\(4, 5\\), its data \\(4, 4\\)"):
        verify(graph)


def test_edits_keep_uses_consistent() -> None:
    graph = chain()
    first, second, third = graph.nodes
    replace_uses(graph, second.output, first.output)
    verify(graph)
    with pytest.raises(GraphError, match="is still read"):
        remove_node(graph, first)
    assert remove_dead(graph) == 1
    verify(graph)
    assert graph.nodes == [first, third]


def test_a_copy_is_independent() -> None:
    graph = chain()
    copy = graph.copy()
    set_input(copy.nodes[1], 0, copy.inputs[0], copy)
    verify(graph)
    verify(copy)
    x = torch.randn(2, 4)
    assert not torch.equal(run(graph, [x])[0], run(copy, [x])[0])
    assert copy.parameters["w0"].tensor.data_ptr() == graph.parameters["w0"].tensor.data_ptr()
