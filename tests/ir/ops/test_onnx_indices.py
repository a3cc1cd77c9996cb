"""Indices of ONNX files that count from the end, held to onnxruntime; and plain lookups where none can."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import regauge
from onnx_node import check_node, normal
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.ir.ops.onnx_indices import never_negative

TYPES = (np.int64, np.int32)


@st.composite
def calls(draw: Any) -> tuple[str, list[Any], dict[str, Any]]:
    """An operator that reads or writes by indices, with its operands: tables are constants, indices are not."""
    op = draw(st.sampled_from(["table", "Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND"]))
    x = normal(*draw(st.lists(st.integers(1, 5), min_size=2, max_size=3)))
    axis = draw(st.integers(-x.ndim, x.ndim - 1))
    kind = np.int64 if op.endswith("ND") else draw(st.sampled_from(TYPES))
    seed = np.random.default_rng(draw(st.integers(0, 1000)))

    def indices(size: int, shape: Any) -> np.ndarray:
        return seed.integers(-size, size, shape).astype(kind)

    if op == "table":
        rows = normal(draw(st.integers(1, 6)), 3)
        return op, [rows, indices(len(rows), draw(st.sampled_from([(), (4,), (2, 3)])))], {}
    if op == "Gather":
        return op, [x, indices(x.shape[axis], draw(st.sampled_from([(), (4,), (2, 3)])))], {"axis": axis}
    if op == "GatherElements":
        return op, [x, indices(x.shape[axis], x.shape)], {"axis": axis}
    if op == "ScatterElements":  # each place once, and counted from either end
        order = np.argsort(seed.random(x.shape), axis=axis)
        places = (order - x.shape[axis] * seed.integers(0, 2, x.shape)).astype(kind)
        return op, [x, places, normal(*x.shape)], {"axis": axis}
    if op == "GatherND":
        return op, [x, np.stack([indices(size, (4,)) for size in x.shape[:2]], axis=-1)], {}
    rows = np.unravel_index(seed.permutation(x.shape[0] * x.shape[1])[:3], x.shape[:2])
    places = np.stack([row - size * seed.integers(0, 2) for row, size in zip(rows, x.shape, strict=False)], axis=-1)
    reduction = draw(st.sampled_from(["none", "add", "mul", "max", "min"]))
    return op, [x, places.astype(kind), normal(len(places), *x.shape[2:])], {"reduction": reduction}


@hypothesis_settings(max_examples=60, deadline=None)
@given(calls())
def test_indices_may_count_from_the_end(call: tuple[str, list[Any], dict[str, Any]]) -> None:
    """What runs, and what is emitted."""
    op, inputs, attributes = call
    op, constants = ("Gather", (0,)) if op == "table" else (op, ())
    graph = check_node(op, inputs, opset=18, constants=constants, **attributes)
    given_ = [torch.from_numpy(array) for place, array in enumerate(inputs) if place not in constants]
    (expected,) = graph.run(given_)
    assert torch.equal(graph.to_torch()(*given_), expected)


def lookup(ids: onnx.NodeProto | None, **metadata: str) -> Graph:
    """A table of 7 rows, read by an input, or by what a node computes of it."""
    nodes = [] if ids is None else [ids]
    read_by = "ids" if ids is None else ids.output[0]
    read = helper.make_node("Gather", ["table.weight", read_by], ["y"], name="/table/Gather")
    kind = TensorProto.FLOAT if ids is not None and ids.op_type == "ArgMax" else TensorProto.INT64
    graph = helper.make_graph(
        [*nodes, read],
        "lookup",
        [helper.make_tensor_value_info("ids", kind, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(normal(7, 4), "table.weight")],
    )
    return regauge.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, **metadata))


def text_of(graph: Graph, folder: Path) -> str:
    graph.write(folder)
    return "".join(file.read_text() for file in folder.rglob("*.py"))


def test_a_file_that_says_nothing_is_read_as_onnx_has_it(tmp_path: Path) -> None:
    graph = lookup(None)
    assert graph.nodes[-1].attributes["from_end"]
    rows = graph.run(torch.tensor([[6, -1, 0], [-7, 3, 3]]))[0]
    assert torch.equal(rows[0, 0], rows[0, 1]) and torch.equal(rows[0, 2], rows[1, 0])
    assert "F.embedding(torch.where(x < 0, x + 7, x), self.weight)" in text_of(graph, tmp_path / "emitted")


@pytest.mark.parametrize("op", ["ArgMax", "Abs"])
def test_places_and_sizes_need_no_care(op: str) -> None:
    graph = lookup(helper.make_node(op, ["ids"], ["places"]))
    assert graph.nodes[-1].op == "embedding" and not graph.nodes[-1].attributes["from_end"]


def test_ids_of_a_layer_of_torch_need_no_care(tmp_path: Path) -> None:
    """By the name of a node that the older exporter gives, and by the class that the other one notes."""
    assert not lookup(None, producer_name="pytorch").nodes[-1].attributes["from_end"]
    module = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 2)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.tensor([[1, 2]]),), tmp_path / "m.onnx", dynamo=True, verbose=False)
    loaded = regauge.load(tmp_path / "m.onnx")
    (node,) = (node for node in loaded.nodes if node.op == "embedding")
    assert not node.attributes["from_end"]
    text = text_of(loaded, tmp_path / "emitted")
    assert "nn.Embedding(7, 4)" in text and "torch.where" not in text


class Lookup(torch.nn.Module):
    """A table that is no layer: its rows are read as x[i], which takes negative numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(torch.randn(7, 4))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.rows[index] * 2


def test_rows_of_a_parameter_of_torch_may_be_counted_from_the_end(tmp_path: Path) -> None:
    module, index = Lookup(), torch.tensor([[6, -1], [-7, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (index,), tmp_path / "m.onnx", dynamo=True, verbose=False)
    loaded = regauge.load(tmp_path / "m.onnx")
    torch.testing.assert_close(loaded.to_torch()(index), module(index).detach())


def test_what_is_made_of_numbers_that_are_not_negative_is_not() -> None:
    graph = Graph("g")
    build = Builder(graph)
    ids, mask = build.input("ids", (2, 3), torch.int64), build.input("mask", (2, 3), torch.bool)
    counted = build.cast(mask, dtype=torch.int64)
    places = build.add(build.mul(build.cumsum(counted, dim=1), counted), 1)  # RoBERTa's
    assert never_negative(places)
    assert never_negative(build.reshape(build.unsqueeze(build.arange(end=3), dim=0), shape=(3,)))
    assert not never_negative(build.sub(places, 1)) and not never_negative(build.add(places, -1))
    assert not never_negative(build.add(places, ids)) and not never_negative(ids)
    assert never_negative(build.constant(torch.tensor([0, 4]), "c"))
    assert not never_negative(build.constant(torch.tensor([0, -4]), "d"))
    assert not never_negative(build.arange(end=3, start=-2))
    assert never_negative(build.gather(build.arange(end=9), build.reshape(ids, shape=(6,)), dim=0))
