"""What tests of ``simplify`` share: small graphs, and the check that a graph still computes what it did."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Value
from regauge.ir.rewriting.rewrite import RuleSet, rewrite_graph
from regauge.ir.running.interpret import run
from regauge.ir.running.sample_inputs import sample_inputs
from regauge.ir.sizes.expressions import Size, symbol
from regauge.ir.verify import verify

BATCH = symbol("batch")


def made(
    function: Callable[..., Any], dtype: Any = torch.float64, *, dynamic: bool = False, **shapes: tuple[Size, ...]
) -> Graph:
    """The graph of ``function(build, **inputs)``, which returns its results; ``BATCH`` in a shape is a dynamic size."""
    graph = Graph("made")
    if any(BATCH in shape for shape in shapes.values()):
        graph.symbols[BATCH] = (1, None)
    build = Builder(graph)
    inputs = {name: build.input(name, shape, dtype) for name, shape in shapes.items()}
    found = function(build, **inputs)
    graph.outputs = list(found) if isinstance(found, list | tuple) else [found]
    return graph


def simplified(graph: Graph, rules: RuleSet) -> Graph:
    """A copy after the rules, which computes the same at two bindings of each dynamic size, one of them 1."""
    after = graph.copy()
    rewrite_graph(after, rules)
    same_function(graph, after)
    return after


def same_function(before: Graph, after: Graph, tolerance: float = 1e-9) -> None:
    verify(after)
    assert [output_name(o) for o in after.outputs] == [output_name(o) for o in before.outputs]
    assert [len({id(o) for o in graph.outputs}) for graph in (before, after)][0] == len({id(o) for o in after.outputs})
    for binding in (1, 3) if before.symbols else (1,):
        inputs = sample_inputs(before, sizes=dict.fromkeys(before.symbols, binding))
        for a, b in zip(run(before, inputs), run(after, inputs), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, equal_nan=True)


def output_name(output: Any) -> str:
    return output.name if isinstance(output, Value) else str(output)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def counts(graph: Graph) -> Mapping[str, int]:
    return {op: ops(graph).count(op) for op in ops(graph)}
