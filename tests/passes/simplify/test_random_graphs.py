"""All of ``simplify`` on random graphs: the same function at two batches, done in one run, deterministic."""

import pytest
from hypothesis import HealthCheck, given, settings

from random_graphs import graphs
from regauge.ir.graph import Graph
from regauge.passes.base import Context
from regauge.passes.simplify.simplify import Simplify
from simplifying import same_function

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def check(graph: Graph) -> None:
    text = str(graph)
    after = Simplify().call(graph, Context())
    assert str(graph) == text
    same_function(graph, after)
    assert Simplify().call(after, Context()) is after, "a second run finds something to do"
    assert str(Simplify().call(graph, Context())) == str(after)


@settings(max_examples=150, suppress_health_check=SLOW)
@given(graph=graphs())
def test_simplify_keeps_the_function(graph: Graph) -> None:
    check(graph)


@pytest.mark.nightly
@settings(max_examples=10_000, suppress_health_check=SLOW, derandomize=False)
@given(graph=graphs())
def test_simplify_keeps_the_function_of_many_graphs(graph: Graph) -> None:
    check(graph)
