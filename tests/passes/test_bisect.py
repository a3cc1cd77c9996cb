"""Bisecting a pipeline down to the first Dim whose cut breaks a check."""

import pytest

from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.bisect import bisect
from small_graphs import multilayer_perceptron, residual_network


def wide_enough(graph: Graph) -> bool:
    return all(group.size >= 12 for group in graph.groups() if group.name == "layer2.weight:0")


def test_first_bad_pass_and_dim() -> None:
    graph = multilayer_perceptron(4, *[16] * 6, 4)
    culprit = bisect(graph, "prune{ratio=0.1},prune{ratio=0.5}", wide_enough)
    assert culprit is not None
    assert (culprit.index, culprit.site) == (1, "layer2.weight:0")
    assert str(culprit) == "pass 2, prune{ratio=0.5,limit=3}, at layer2.weight:0"


def test_nothing_is_wrong() -> None:
    assert bisect(residual_network(), "prune{compensate=false,ratio=0.5}", wide_enough) is None


def test_check_that_fails_from_the_start() -> None:
    with pytest.raises(PassError, match="fails on the graph before any pass"):
        bisect(residual_network(), "prune{compensate=false,ratio=0.5}", lambda graph: False)
