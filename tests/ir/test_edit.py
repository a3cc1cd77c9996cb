"""Edits: what they check, and what they leave behind."""

import pytest
import torch

import regauge
from regauge.ir.edit import Builder, dead_nodes, remove_dead, remove_node, remove_parameter, replace_uses, set_weight
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.ir.sizes.expressions import symbol
from small_graphs import multilayer_perceptron


def test_set_weight_changes_one_copy_only() -> None:
    graph = multilayer_perceptron(4, 8, 3)
    copy = graph.copy()
    before = graph.parameters["layer0.weight"].tensor.clone()
    set_weight(copy, copy.parameters["layer0.weight"], torch.zeros(8, 4, dtype=torch.float64), by="zero")
    assert not copy.parameters["layer0.weight"].tensor.any()
    assert torch.equal(graph.parameters["layer0.weight"].tensor, before)
    assert [(edit.by, edit.what) for edit in copy.history] == [("zero", "layer0.weight: new weight")]


def test_set_weight_refuses_other_shapes_types_and_graphs() -> None:
    graph = multilayer_perceptron(4, 8, 3)
    copy = graph.copy()
    weight = copy.parameters["layer0.weight"]
    with pytest.raises(GraphError, match=r"%layer0.weight: f64\[8,4\] cannot hold f64\[7, 4\]: cut it with resize"):
        set_weight(copy, weight, torch.zeros(7, 4, dtype=torch.float64))
    with pytest.raises(GraphError, match=r"cannot hold f32\[8, 4\]"):
        set_weight(copy, weight, torch.zeros(8, 4))
    with pytest.raises(GraphError, match=r"is no parameter of graph 'perceptron': use graph.parameters"):
        set_weight(graph, weight, torch.zeros(8, 4, dtype=torch.float64))


class Unread(torch.nn.Module):
    """Holds a table that its forward never reads, and a layer whose result it drops."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(3))
        self.auxiliary = torch.nn.Linear(4, 2)
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.auxiliary(x)
        return self.layer(x)  # type: ignore[no-any-return]


def replaced_layer(graph: Graph) -> Graph:
    """The layer with weights of other names, its old node gone."""
    result = graph.copy()
    (old,) = [node for node in result.nodes if node.op == "linear"]
    build = Builder(result)
    weight, bias = (build.parameter(f"new.{name}", torch.randn(*size)) for name, size in (("w", (2, 4)), ("b", (2,))))
    replace_uses(result, old.output, build.linear(result.inputs[0], weight, bias))
    remove_node(result, old)
    return result


def test_parameters_that_lost_their_readers_go_and_those_never_read_stay() -> None:
    graph = regauge.capture(Unread().eval(), (torch.randn(1, 4),))
    assert set(graph.parameters) == {"table", "auxiliary.weight", "auxiliary.bias", "layer.weight", "layer.bias"}
    result = replaced_layer(graph)
    assert remove_dead(result) == 0
    assert set(result.parameters) == {"table", "auxiliary.weight", "auxiliary.bias", "new.w", "new.b"}
    assert set(result.to_torch().state_dict()) == set(result.parameters)
    assert {"layer.weight", "layer.bias"} < set(graph.parameters), "the given graph keeps its own"


def test_frontends_keep_all_that_is_left_unread() -> None:
    graph = multilayer_perceptron(4, 8, 3)
    Builder(graph).relu(graph.parameters["layer0.weight"])
    replace_uses(graph, graph.outputs[0], graph.inputs[0])  # type: ignore[arg-type]
    assert remove_dead(graph, parameters=False) == 4
    assert set(graph.parameters) == {"layer0.weight", "layer1.weight"}
    remove_dead(graph)
    assert set(graph.parameters) == {"layer0.weight", "layer1.weight"}, "they count as never read from then on"


def test_kept_nodes_keep_what_they_read() -> None:
    graph = multilayer_perceptron(4, 8, 3)
    unread = Builder(graph).relu(graph.parameters["layer0.weight"])
    assert remove_dead(graph, keep={unread.name}) == 0
    assert remove_dead(graph) == 1


def test_remove_parameter_refuses_while_something_reads_it() -> None:
    graph = multilayer_perceptron(4, 8, 3)
    build = Builder(graph)
    spare, shown = build.parameter("spare", torch.zeros(2)), build.parameter("shown", torch.zeros(2))
    graph.outputs.append(shown)
    remove_parameter(graph, spare, by="tidy")
    assert "spare" not in graph.parameters and graph.history[-1].what == "spare: removed"
    with pytest.raises(GraphError, match=r"layer0.weight.* cannot be removed: linear = linear reads it"):
        remove_parameter(graph, graph.parameters["layer0.weight"])
    with pytest.raises(GraphError, match=r"shown.* cannot be removed: output 1 reads it"):
        remove_parameter(graph, shown)
    with pytest.raises(GraphError, match=r"spare.* is no parameter of graph 'perceptron'"):
        remove_parameter(graph, spare)


def test_what_tells_a_size_that_is_read_is_not_dead() -> None:
    """Of the hits of a mask only their number is wanted; of what tells the size of an input nothing is."""
    hits, n = symbol("hits"), symbol("n")
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (n,), torch.bool)
    build("nonzero", x, results=[((hits, 1), torch.int64)])
    unread = build("nonzero", x, results=[((symbol("others"), 1), torch.int64)])
    graph.outputs = [build.full(shape=(), value=hits + n, dtype=torch.int64)]
    assert dead_nodes(graph) == [unread.producer]
    assert remove_dead(graph) == 1
    assert int(run(graph, [torch.tensor([True, False, True])])[0]) == 5
