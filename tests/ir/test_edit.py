"""Edits: what they check, and what they leave behind."""

import pytest
import torch

from regauge.ir.edit import set_weight
from regauge.ir.errors import GraphError
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
