"""Constant folding: tables go, what an input, a weight, a size or chance decides stays."""

import torch

from regauge.ir.edit import Builder
from regauge.ir.folding.fold import fold_constants
from regauge.ir.graph import Graph, Node
from regauge.ir.running.interpret import run
from regauge.ir.sizes.expressions import symbol
from regauge.ir.verify import verify


def operators(nodes: list[Node]) -> list[str]:
    return [node.op for node in nodes]


def test_tables_become_constants_and_their_makers_go() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (4,), torch.float32)
    table = build.parameter("positions", torch.arange(8), "buffer")
    graph.outputs = [build.add(x, build.mul(build.slice(table, dim=0, start=0, end=4, step=1), 2))]
    assert fold_constants(graph) == 2
    verify(graph)
    assert operators(graph.nodes) == ["add"]
    assert torch.equal(run(graph, [torch.zeros(4)])[0], torch.tensor([0.0, 2.0, 4.0, 6.0]))
    assert "positions" in graph.parameters  # a buffer belongs to the state, read or not


def test_what_stays() -> None:
    graph = Graph()
    build = Builder(graph)
    batch = symbol("batch")
    x = build.input("x", (batch,), torch.float32)
    weight = build.parameter("w", torch.ones(1))
    trained = build.mul(weight, 2)
    sized = build.full(shape=(batch,), value=1.0, dtype=torch.float32)
    alone = build.full(shape=(1,), value=1.0, dtype=torch.float32)
    drawn = build.rand(shape=(1,), dtype=torch.float32)
    graph.outputs = [x, trained, sized, alone, drawn]
    assert fold_constants(graph) == 0
    assert operators(graph.nodes) == ["mul", "full", "full", "rand"]


def test_what_cannot_be_computed_stays() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (3,), torch.float32)
    table = build.parameter("positions", torch.tensor([7]), "buffer")
    picked = build.index_select(build.constant(torch.ones(3)), table, dim=0)
    graph.outputs = [build.add(x, picked)]
    assert fold_constants(graph) == 0


def test_what_runtimes_disagree_about_stays() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (2,), torch.float32)
    endless = build.constant(torch.tensor([torch.inf, 0.0]), "endless")
    whole = build.constant(torch.tensor([0, 2]), "whole")
    undefined = build.mul(endless, 0.0)  # a NaN on most machines, but no number's
    power = build.pow(whole, build.constant(torch.tensor([-1, 1]), "exponents"))
    plain = build.pow(whole, build.constant(torch.tensor([3, 1]), "others"))
    passed = build.mul(build.constant(torch.tensor([torch.nan, 1.0]), "missing"), 2.0)
    graph.outputs = [build.add(x, value) for value in (undefined, power, plain, passed)]
    fold_constants(graph)
    assert operators(graph.nodes) == ["mul", "pow", "add", "add", "add", "add"]
