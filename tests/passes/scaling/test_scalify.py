"""Scalify: the de-scaled result is the original, bit for bit where the type stays, and narrow types do not overflow."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import regauge
from random_networks import networks
from regauge.ir.graph import Graph
from regauge.ir.sample_inputs import sample_inputs
from regauge.settings import using


def scalified(graph: Graph, text: str = "scalify", data: Any = None) -> Graph:
    with using(verify="structure"):  # what the pass promises is checked here, and more strictly
        return regauge.optimize(graph, text, data=data)


@given(networks(), st.sampled_from(["", "rescale=max", "rescale=l1", "rescale=l2"]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_same_numbers_come_out_bit_for_bit(graph: Graph, options: str, with_data: bool) -> None:
    inputs = sample_inputs(graph)
    data = [sample_inputs(graph, seed=1)] if with_data else None
    result = scalified(graph, f"scalify{{{options}}}", data)
    for found, expected in zip(result.run(inputs), graph.run(inputs), strict=True):
        assert torch.equal(found, expected)


@given(networks(), st.booleans(), st.sampled_from(["float16", "bfloat16"]))
@settings(max_examples=15, deadline=None)
def test_half_precision_is_as_near_as_the_type_is_fine(graph: Graph, with_data: bool, dtype: str) -> None:
    inputs = sample_inputs(graph)
    result = scalified(graph, f"scalify{{dtype={dtype}}}", [inputs] if with_data else None)
    fine = torch.finfo(getattr(torch, dtype)).eps
    for found, expected in zip(result.run(inputs), graph.run(inputs), strict=True):
        assert found.dtype == expected.dtype
        assert float((found - expected).norm() / expected.norm()) < 40 * fine
