"""Lookups, indexing and scatters: values against torch, numpy and onnxruntime; what is carried stays free."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, randint, randn

from cutting import cut_all, free_sizes
from onnx_node import check_node, normal, operators
from regauge.frontends.capture import capture
from regauge.ir.dims.extents import leaves
from regauge.ir.dims.groups import find_group
from regauge.ir.edit import Builder
from regauge.ir.gauge.classes import Gauge, gauges
from regauge.ir.graph import Graph, Value
from regauge.ir.operator import get_operator


class Call(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.function(*tensors)


X, FIRST, SECOND = randn(4, 5, 6), torch.tensor([3, 0, -1]), torch.tensor([[1], [-2]])
PLACES = torch.tensor([[[1, 0, 3]]]).expand(4, 5, 3)
ROWS, SOURCE = torch.tensor([2, 0]), randn(4, 5, 3)

CALLS = {
    "one index": (lambda x, i: x[:, i], X, FIRST),
    "scalar tensor": (lambda x: x[torch.tensor(2)], X),
    "apart": (lambda x, i, j: x[i, :, j], X, FIRST, SECOND),
    "side by side": (lambda x, i, j: x[:, i, j], X, FIRST, SECOND),
    "three": (lambda x, i, j: x[i, j, i], X, FIRST, SECOND),
    "computed mask": (lambda x: x[x > 0], X),
    "put": (lambda x, v: x.index_put((ROWS,), v), X, randn(2, 5, 6)),
    "put and add": (lambda x, v: x.index_put((torch.tensor([1, 1]),), v, accumulate=True), X, randn(2, 5, 6)),
    "put by mask": (lambda x: torch.index_put(x, (x[:, :, 0] > 0,), torch.tensor(2.0)), X),
    "assigned": (lambda x, i: x.clone().index_put_((i,), torch.tensor(0.0)), X, FIRST),
    "index_select": (lambda x, i: x.index_select(2, i), X, ROWS),
    "take": (lambda x, i: torch.take(x, i), X, torch.tensor([[7, 100], [3, -1]])),
    "take_along_dim": (lambda x, i: torch.take_along_dim(x, i, 1), X, torch.tensor([[[1], [4]]])),
    "take_along flat": (lambda x, i: torch.take_along_dim(x, i), X, torch.tensor([1, 44])),
    "gather": (lambda x, i: x.gather(2, i), X, PLACES),
    "scatter": (lambda x, i, s: x.scatter(2, i, s), X, PLACES, randn(4, 5, 3)),
    "scatter a number": (lambda x, i: x.scatter(2, i, 0.5), X, PLACES),
    "scatter and add": (lambda x, i, s: x.scatter(2, i, s, reduce="add"), X, PLACES, randn(4, 5, 3)),
    "scatter number and multiply": (lambda x, i: x.scatter(2, i, 0.5, reduce="multiply"), X, PLACES),
    "scatter_add": (lambda x, i, s: x.scatter_add(2, i, s), X, PLACES, randn(4, 5, 3)),
    "scatter_reduce": (lambda x, i, s: x.scatter_reduce(2, i, s, "mean", include_self=False), X, PLACES, SOURCE),
    "index_add": (lambda x, s: x.index_add(0, ROWS, s, alpha=2), X, randn(2, 5, 6)),
    "index_copy": (lambda x, s: x.index_copy(0, ROWS, s), X, randn(2, 5, 6)),
    "index_fill": (lambda x: x.index_fill(1, ROWS, 1.5), X),
    "masked_scatter": (lambda x, s: x.masked_scatter(x > 0, s), X, randn(120)),
    "one_hot": (lambda i: nn.functional.one_hot(i, 5), FIRST.abs()),
    "embedding": (lambda i, w: nn.functional.embedding(i, w, padding_idx=1), FIRST.abs(), randn(5, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_captured_calls_give_what_torch_gives(name: str) -> None:
    function, *tensors = CALLS[name]
    graph = capture(Call(function), tuple(tensors), verify=True)
    assert "torch_call" not in operators(graph)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags(mode: str) -> None:
    bags = nn.EmbeddingBag(7, 4, mode=mode)
    graph = capture(bags, (randint(0, 7, (6,)), torch.tensor([0, 2, 5])))
    assert "embedding_bag" in operators(graph)
    assert free_sizes(capture(nn.Sequential(bags, nn.Linear(4, 2)), (randint(0, 7, (3, 5)),))) == {"0.weight:1": 4}


def test_a_relative_bias_table_keeps_its_heads_free() -> None:
    graph = Graph()
    build = Builder(graph)
    scores = build.input("scores", (2, 3, 3, 4), torch.float32)
    table = build.parameter("table", randn(5, 4))
    places = build.constant(randint(0, 5, (9,)), "places")
    bias = build.reshape(build.index_select(table, places, dim=0), shape=(3, 3, 4))
    first = build.parameter("first", randn(4, 4))
    mixed = build.add(build.linear(scores, first), bias)
    graph.outputs = [build.linear(mixed, build.parameter("last", randn(2, 4)))]
    cut_all(graph, [randn(2, 3, 3, 4)])
    assert free_sizes(graph) == {"table:1": 4}


def axes_of_one(op: str, *tensors: torch.Tensor | None, **attributes: Any) -> tuple[Graph, Value]:
    graph = Graph()
    build = Builder(graph)
    operands = [None if t is None else build.parameter(f"p{i}", t) for i, t in enumerate(tensors)]
    return graph, build(op, *operands, **attributes)


def pinned(graph: Graph, name: str) -> list[bool]:
    return [any(dim.pins for dim in leaves(extent)) for extent in graph.axes.of[graph.parameters[name]]]


def test_what_is_looked_up_is_pinned_and_what_is_carried_is_free() -> None:
    graph, _ = axes_of_one("index", randn(5, 3, 6, 2), torch.tensor([1, 2]), None, torch.tensor([0, 5]))
    assert pinned(graph, "p0") == [True, False, True, False]
    graph, _ = axes_of_one("gather_nd", randn(5, 3, 6), torch.tensor([[1], [2]]))
    assert pinned(graph, "p0") == [True, False, False]
    graph, _ = axes_of_one("index_put", randn(5, 3), randn(2, 3), torch.tensor([1, 2]))
    assert pinned(graph, "p0") == [True, False]
    graph, _ = axes_of_one("scatter_nd", randn(5, 3), torch.tensor([[1], [2]]), randn(2, 3))
    assert pinned(graph, "p2") == [True, False]


def test_rows_written_whole_by_a_mask_stay_free() -> None:
    graph = Graph()
    build = Builder(graph)
    tokens = build.input("tokens", (2, 3, 4), torch.float32)
    image = build.input("image", (2, 4), torch.float32)
    mask = build.input("mask", (2, 3), torch.bool)
    x = build.linear(tokens, build.parameter("text", randn(6, 4)))
    source = build.linear(image, build.parameter("vision", randn(6, 4)))
    rows = build.expand(build.unsqueeze(mask, dim=2), shape=(2, 3, 6))
    graph.outputs = [build.linear(build.masked_scatter(x, rows, source), build.parameter("last", randn(2, 6)))]
    mask_data = torch.tensor([[True, False, False], [False, True, False]])
    cut_all(graph, [randn(2, 3, 4), randn(2, 4), mask_data])
    assert list(free_sizes(graph).values()) == [6]


def test_an_embedding_is_a_standard_layer() -> None:
    graph, value = axes_of_one("embedding", randn(7, 4), torch.tensor([1]), padding_idx=2)
    layer = get_operator("embedding").layer
    assert layer is not None and value.producer is not None
    assert layer(value.producer) == "nn.Embedding(7, 4, padding_idx=2)"


# -- ONNX forms against onnxruntime ------------------------------------------------------------------------------------

TABLE, DATA, IDS = normal(7, 4), normal(3, 7, 4), np.array([[1, 6], [0, 3]])
PLACED = np.array([[1, -1, 0, 5]])

NODES: list[tuple[str, list[Any], dict[str, Any], list[str]]] = [
    ("Gather", [TABLE, IDS], {"constants": [0]}, ["embedding"]),
    ("Gather", [TABLE, IDS - 5], {"constants": [0, 1]}, ["index_select"]),
    ("Gather", [DATA, IDS - 2], {"axis": 1}, ["index_select"]),
    ("Gather", [DATA, np.array(-2)], {"axis": 1, "constants": [1]}, ["select"]),
    ("Gather", [DATA, np.array(2)], {"axis": -1}, ["index_select"]),
    ("Gather", [DATA, np.array([2, 3, 4])], {"axis": 1, "constants": [1]}, ["slice"]),
    ("Gather", [DATA, np.array([-1])], {"axis": 1, "constants": [1]}, ["slice"]),
    ("Gather", [DATA, np.array([2, 2, 4])], {"axis": 1, "constants": [1]}, ["index_select"]),
    ("GatherElements", [DATA, np.array([[[1, -1, 0, 5]]] * 3)], {"axis": 1}, ["remainder", "gather"]),
    ("GatherElements", [DATA, np.array([[[1, -1, 0, 5]]] * 3)], {"axis": 1, "constants": [1]}, ["remainder", "gather"]),
    ("GatherND", [DATA, np.array([[1, -1], [0, 5]])], {}, ["gather_nd"]),
    ("GatherND", [DATA, np.array([[1], [0], [-3]])], {"batch_dims": 1}, ["gather_nd"]),
    ("OneHot", [IDS - 1, np.array(5), np.array([0.5, 2.0], np.float32)], {"constants": [1]}, []),
    ("OneHot", [IDS, np.array([5]), np.array([0, 1])], {"axis": 1, "constants": [1, 2]}, []),
    ("Compress", [DATA, np.array([True, False, True])], {"axis": 1, "constants": [1]}, ["index_select"]),
    ("Compress", [DATA, np.array([True, False, True])], {"constants": [1]}, ["reshape", "index_select"]),
    ("Compress", [DATA, np.array([True, False, True])], {"axis": 1}, ["onnx_call"]),
    ("ScatterElements", [TABLE, PLACED, normal(1, 4)], {}, ["remainder", "scatter"]),
    ("ScatterElements", [TABLE, PLACED, normal(1, 4)], {"reduction": "add"}, ["remainder", "scatter_add"]),
    *[("ScatterElements", [TABLE, np.array([[1, 1], [1, 0]]), normal(2, 2)],
       {"reduction": how, "constants": [1], "opset": 18}, ["scatter_reduce"]) for how in ("mul", "max", "min")],
    ("ScatterND", [TABLE, np.array([[1], [-1]]), normal(2, 4)], {}, ["scatter_nd"]),
    ("ScatterND", [TABLE, np.array([[1, 2], [-1, 0]]), normal(2)], {"reduction": "add"}, ["scatter_nd"]),
    *[("ScatterND", [TABLE, np.array([[1], [1]]), normal(2, 4)], {"reduction": how, "opset": 18}, ["scatter_nd"])
      for how in ("mul", "max", "min")],
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(NODES)), ids=[f"{op}-{i}" for i, (op, *_) in enumerate(NODES)])
@pytest.mark.filterwarnings("ignore")
def test_onnx_forms_give_what_onnxruntime_gives(case: int) -> None:
    op, inputs, options, expected = NODES[case]
    graph = check_node(op, inputs, **options)
    if expected:
        assert operators(graph) == expected


# -- gauge classes -----------------------------------------------------------------------------------------------------


def test_vectors_that_are_read_whole_may_be_mapped_and_those_read_index_by_index_may_not() -> None:
    graph = Graph()
    build = Builder(graph)
    table, last = build.parameter("table", randn(7, 4)), build.parameter("last", randn(3, 4))
    rows = build.embedding(table, build.constant(randint(0, 7, (5,)), "ids"))
    graph.outputs = [build.linear(rows, last)]
    assert Gauge.GENERAL in gauges(graph)[find_group(graph, "table:1").dim]
    sorted_rows = build.gather(rows, build.constant(randint(0, 5, (5, 4)), "order"), dim=0)
    graph.outputs = [build.linear(sorted_rows, last)]
    found = gauges(graph)[find_group(graph, "table:1").dim]
    assert Gauge.SCALE in found and Gauge.ORTHOGONAL not in found
