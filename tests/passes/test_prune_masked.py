"""The law of pruning: the pruned graph computes what the original computes with the removed entries set to zero.

What was kept is read off the values of the weights (each occurs once), so nothing of Regauge's own index arithmetic is
trusted.
"""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from random_networks import networks
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.ir.running.sample_inputs import sample_inputs
from regauge.optimize import optimize
from regauge.passes.pruning.prune import Prune


def masked_weights(graph: Graph, pruned: Graph) -> dict[str, torch.Tensor]:
    """The original's weights, zero where the pruned graph has no such value any more."""
    masked = {}
    for name, parameter in graph.parameters.items():
        kept = pruned.parameters[name].tensor
        masked[name] = torch.where(torch.isin(parameter.tensor, kept), parameter.tensor, 0.0)
    return masked


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.sampled_from(["l1", "l2", "bn", "random"]), st.sampled_from([0.3, 0.5, 0.8]))
def test_pruned_equals_masked(graph: Graph, score: str, ratio: float) -> None:
    pruned = optimize(graph, Prune(ratio=ratio, score=score, compensate=False))
    assume(not any("computed over the kept" in note for entry in pruned.report.passes for note in entry.notes))
    inputs = sample_inputs(graph)
    expected = run(graph, inputs, weights=masked_weights(graph, pruned))
    for a, b in zip(expected, run(pruned, inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(networks())
def test_something_is_always_cut(graph: Graph) -> None:
    """The hidden width of the head is free in every one of these networks."""
    before = optimize(graph, "prune{ratio=0}").report
    after = optimize(graph, "prune{ratio=0.5,compensate=false}").report
    assert not before.passes[0].changed
    assert after.after.parameters < after.before.parameters and after.after.macs < after.before.macs
