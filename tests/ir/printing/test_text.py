"""The text form reads like a program and parses back."""

import pytest
import torch

from regauge.ir.edit import Builder
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph
from regauge.ir.printing.parse import parse_graph
from regauge.ir.running.interpret import run
from regauge.ir.sizes.expressions import symbol
from regauge.ir.verify import verify

TEXT = """\
graph net(%x: f32[batch,8,6,6]) {
  symbol batch in 1..
  parameter %conv.weight: f32[16,2,3,3] alias "tied.weight"
  parameter %fc.weight: f32[5,144]
  buffer %count: i64[] transient

  %conv = conv(%x, %conv.weight, stride=(2, 2), padding=(1, 1), groups=4): f32[batch,16,3,3]
  %reshape = reshape(%conv, shape=(batch, 144)): f32[batch,144]
  %linear = linear(%reshape, %fc.weight): f32[batch,5]
  return %linear
}"""


def example() -> Graph:
    batch = symbol("batch")
    graph = Graph("net", symbols={batch: (1, None)})
    build = Builder(graph)
    x = build.input("x", (batch, 8, 6, 6), torch.float32)
    weight = build.parameter("conv.weight", torch.randn(16, 2, 3, 3), aliases=("tied.weight",))
    matrix = build.parameter("fc.weight", torch.randn(5, 144))
    build.parameter("count", torch.tensor(0), "buffer", persistent=False)
    h = build.conv(x, weight, stride=(2, 2), padding=(1, 1), groups=4)
    graph.outputs = [build.linear(build.reshape(h, shape=(batch, 144)), matrix)]
    return graph


def test_a_graph_prints_as_a_program() -> None:
    assert str(example()) == TEXT


def test_the_text_parses_back_and_runs() -> None:
    graph = example()
    parsed = parse_graph(TEXT, {name: p.tensor for name, p in graph.parameters.items()})
    assert str(parsed) == TEXT
    verify(parsed, axes=True)
    x = torch.randn(3, 8, 6, 6)
    torch.testing.assert_close(run(parsed, [x]), run(graph, [x]))


def test_a_parsed_graph_without_weights_can_be_analysed_but_not_run() -> None:
    parsed = parse_graph(TEXT)
    assert [group.name for group in parsed.groups() if group.free] == [g.name for g in example().groups() if g.free]
    with pytest.raises(GraphError, match="has no data: pass weights"):
        run(parsed, [torch.randn(1, 8, 6, 6)])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("%a = linear(%nothing, %fc.weight): f32[1]", "%nothing is not defined"),
        ("%a = linear(%x, import os): f32[1]", "'import os' is not an attribute value"),
        ("what is this", "this is no statement"),
        ("%a, %b = linear(%x, %fc.weight): f32[1]", "2 results but 1 types"),
    ],
)
def test_faults_name_the_line(line: str, reason: str) -> None:
    text = TEXT.replace("  return", f"  {line}\n  return")
    with pytest.raises(GraphError, match=f"line 10: {reason}"):
        parse_graph(text)


def test_a_representation_never_fails() -> None:
    graph = example()
    assert repr(graph.nodes[0]).startswith("%conv = conv(")
    assert repr(graph) == "<Graph net: 3 nodes, 3 parameters>"
    assert "pinned: it is an axis of a graph input (x)" in repr(graph.groups()[0])


def test_an_unknown_rank_is_no_scalar() -> None:
    text = "graph g(%x: f32[...], %s: f32[]) {\n  return %x, %s\n}"
    graph = parse_graph(text)
    assert str(graph) == str(graph.copy()) == text
    assert [value.ranked for value in graph.copy().inputs] == [False, True]
    assert graph.inputs[0].shape != graph.inputs[1].shape
