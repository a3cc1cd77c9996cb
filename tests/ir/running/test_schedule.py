"""Steps of a run are kept between runs, and are those of the graph as it is."""

import torch

from regauge.ir.edit import Builder, set_input
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.ir.running.schedule import schedule


def chain() -> Graph:
    build = Builder(Graph())
    x = build.input("x", (3,), torch.float32)
    y = build.relu(x, name="y")
    build.graph.outputs = [build.mul(build.neg(y, name="z"), y, name="w")]
    return build.graph


def test_values_end_with_their_last_reader() -> None:
    graph = chain()
    y, z, w = (node.output for node in graph.nodes)
    assert [step.last for step in schedule(graph)] == [(), (), (y, z)]
    assert schedule(graph) is schedule(graph)
    graph.outputs = [z, w]  # put in place, with no edit told
    assert [step.last for step in schedule(graph)] == [(), (), (y,)]
    found = run(graph, (torch.tensor([-1.0, 2.0, 3.0]),))
    assert [y.tolist() for y in found] == [[0, -2, -3], [0, -4, -9]]


def test_an_edit_makes_another_schedule() -> None:
    graph = chain()
    y, z, _ = (node.output for node in graph.nodes)
    given = torch.tensor([-1.0, 2.0, 3.0])
    assert run(graph, (given,))[0].tolist() == [0, -4, -9]
    set_input(graph.nodes[2], 1, graph.inputs[0], graph)
    assert [step.last for step in schedule(graph)] == [(), (y,), (z,)]
    assert run(graph, (given,))[0].tolist() == [0, -4, -9]
    assert run(graph, (-given,))[0].tolist() == [-1, 0, 0]
