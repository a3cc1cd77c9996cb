"""``torch_call``: a torch operator kept verbatim."""

import pytest
import torch

from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Graph
from regauge.ir.operator import get_operator
from regauge.ir.ops.torch_opaque import find_target, literal_text, replace_slots, slot
from regauge.ir.printing.parse import parse_graph
from regauge.ir.running.interpret import run

evaluate = get_operator("torch_call").evaluate


def test_nested_arguments_and_options() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    (found,) = evaluate(x, y, target="aten.cat.default", arguments=((slot(0), slot(1)),), options=(("dim", 1),))
    assert torch.equal(found, torch.cat([x, y], 1))


def test_written_operands_are_copied_and_come_last() -> None:
    x = torch.zeros(3)
    result, copy = evaluate(x, target="aten.add_.Tensor", arguments=(slot(0), 2))
    assert torch.equal(x, torch.zeros(3)) and torch.equal(copy, torch.full((3,), 2.0)) and torch.equal(result, copy)


def test_computed_numbers_stand_where_sizes_are_wanted() -> None:
    (found,) = evaluate(torch.tensor(4), target="aten.ones.default", arguments=((slot(0),),))
    assert found.shape == (4,)


def test_strings_that_look_like_slots() -> None:
    assert replace_slots((literal_text("%1"), literal_text("&"), slot(1)), lambda sign, index: index) == ("%1", "&", 1)


def test_unknown_targets_say_what_to_do() -> None:
    with pytest.raises(OperatorError, match="import the library that registers it"):
        find_target("nowhere.to_be_found.default")


def test_text_and_pins() -> None:
    graph = Graph("g")
    build = Builder(graph)
    w = build.parameter("w", torch.randn(4, 3))
    graph.outputs = [build.torch_call(w, target="aten.special_i1.default", arguments=(slot(0),))]
    assert all(not group.free for group in graph.groups())
    assert "has no axis rule" in str(graph.groups()[0].dim.pins[0])
    again = parse_graph(str(graph), {"w": graph.parameters["w"].tensor})
    assert torch.equal(run(again, [])[0], run(graph, [])[0])
