"""Whatever a random network is, simplification keeps its function."""

import torch
from hypothesis import given

from random_networks import networks
from regauge import optimize
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.ir.running.sample_inputs import sample_inputs


@given(networks())
def test_simplify_keeps_the_function(graph: Graph) -> None:
    inputs = sample_inputs(graph)
    simple = optimize(graph, "simplify{also=[merges,separable]}")
    for found, expected in zip(run(simple, inputs), run(graph, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
