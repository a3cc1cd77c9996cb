"""Regions as nodes of the graph: they read like a program, run, cost what moves, and become nodes again."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from decoder_block import decoder_block
from random_graphs import graphs
from regauge.ir.cost import figures
from regauge.ir.dims.resize import resize
from regauge.ir.edit import Builder
from regauge.ir.errors import FusionError
from regauge.ir.fusion import legality
from regauge.ir.fusion.fuse import fuse, fuse_graph, traced
from regauge.ir.fusion.fused import body_of, canonical, fused_nodes, unfuse, without_fused
from regauge.ir.fusion.legality import fault
from regauge.ir.fusion.plan import plan_fusion
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph
from regauge.ir.memory.activations import activation_bytes
from regauge.ir.printing.parse import parse_graph
from regauge.ir.roofline import DEVICES, roofline
from regauge.ir.running.sample_inputs import sample_inputs
from regauge.ir.verify import verify
from small_graphs import gated_layers


def gate() -> Graph:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (5, 16), torch.float32)
    weights = [build.parameter(name, torch.randn(8, 16)) for name in ("gate", "up")]
    y = build.mul(build.silu(build.linear(x, weights[0])), build.linear(x, weights[1]))
    graph.outputs = [build.linear(y, build.parameter("down", torch.randn(16, 8)))]
    return graph


def fused(graph: Graph) -> Graph:
    result = graph.copy()
    fuse_graph(result)
    return result


def test_a_region_reads_like_a_program() -> None:
    graph = fused(gate())
    (node,) = fused_nodes(graph)
    assert str(node).splitlines() == [
        "%mul = fused(%linear, %linear_1): f32[5,8] with",
        "  region silu_mul(%linear: f32[5,8], %linear_1: f32[5,8]) {",
        "    %silu = silu(%linear): f32[5,8]",
        "    %mul = mul(%silu, %linear_1): f32[5,8]",
        "    return %mul",
        "  }",
    ]
    assert str(parse_graph(str(graph))) == str(graph)


def test_a_decoder_block_runs_and_comes_back() -> None:
    graph = decoder_block(tokens=16, width=32, hidden=48, dtype=torch.float32)
    found = fused(graph)
    verify(found, axes=True)
    names = [body_of(node).name for node in fused_nodes(found)]
    assert names == ["neg_concat_mul_add_matmul_softmax", "add_rms_norm", "silu_mul"]
    inputs = sample_inputs(graph)
    assert all(torch.equal(a, b) for a, b in zip(found.run(inputs), graph.run(inputs), strict=True))
    assert figures(found) == figures(graph)
    assert unfuse(found) == 3 and not fused_nodes(found)
    verify(found, axes=True)
    assert sorted(str(found).splitlines()) == sorted(str(graph).splitlines())


def test_what_is_fused_moves_and_keeps_its_results_only() -> None:
    graph = decoder_block(tokens=256, width=64, hidden=512, dtype=torch.float32)
    found = fused(graph)
    plan = plan_fusion(graph, contractions=False)
    seconds = [roofline(one, DEVICES["gpu"]).total for one in (graph, found)]
    launches = len(graph) - len(found)
    saved = (plan.bytes_before - plan.bytes) / DEVICES["gpu"].bandwidth + launches * DEVICES["gpu"].overhead
    assert seconds[0] - seconds[1] == pytest.approx(saved, rel=0.1)
    everything = [sum(activation_bytes(one)) for one in (graph, found)]
    assert everything[1] < 0.8 * everything[0]


def test_axes_are_seen_through_a_region() -> None:
    graph, found = gate(), fused(gate())
    for one in (graph, found):
        one.parameters["gate"].weight, one.parameters["up"].weight, one.parameters["down"].weight = (
            w.weight for w in graph.parameters.values()
        )
    keep = [0, 2, 5]
    cut = [resize(one, {one.dims("down")[1][0]: keep}) for one in (graph, found)]
    (node,) = fused_nodes(cut[1])
    assert node.output.shape == (5, 3) == body_of(node).inputs[0].shape
    inputs = sample_inputs(graph)
    assert torch.equal(*(one.run(inputs)[0] for one in cut))


def test_equal_regions_have_equal_text_wherever_they_stand() -> None:
    first, *others = [str(canonical(body_of(node))) for node in fused_nodes(fused(gated_layers()))]
    assert len(set(others)) == 1 and first not in others
    assert parse_graph(others[0]).inputs[0].name == "linear"


def test_the_region_of_a_body_is_that_of_the_plan() -> None:
    graph = decoder_block(tokens=16, width=32, hidden=48, dtype=torch.float32)
    planned = [region for region in plan_fusion(graph, contractions=False).regions if len(region.nodes) > 1]
    regions = [traced(body_of(node)) for node in fused_nodes(fused(graph))]
    assert [sorted(r.names.values()) for r in regions] == [sorted(r.names.values()) for r in planned]
    assert [r.kind for r in regions] == [r.kind for r in planned] and not any(map(fault, regions))


def test_a_graph_without_regions_is_itself() -> None:
    graph = gate()
    assert without_fused(graph) is graph
    assert len(without_fused(fused(graph))) == len(graph)


def test_a_pass_makes_a_region_of_nodes_of_its_own_graph() -> None:
    graph = gate()
    copy = graph.copy()
    chosen = [node for node in copy.nodes if node.op in ("silu", "mul")]
    with pytest.raises(FusionError, match="silu is no node of this graph 'g': a copy has nodes of its own"):
        fuse(Builder(graph), trace(chosen, copy.outputs), "fused")  # type: ignore[arg-type]
    copy.outputs = [*copy.outputs, chosen[0].output]
    with pytest.raises(FusionError, match="the graph returns silu: trace its nodes with the outputs of the graph"):
        fuse(Builder(copy), trace(chosen), "fused")
    node = fuse(Builder(copy), trace(chosen, copy.outputs), "fused")  # type: ignore[arg-type]
    assert [value.name for value in node.outputs] == ["silu", "mul"] and fused_nodes(copy) == [node]
    inputs = sample_inputs(graph)
    torch.testing.assert_close(copy.run(inputs)[0], graph.run(inputs)[0])


@hypothesis_settings(max_examples=25)
@given(graphs())
def test_random_graphs_are_fused_and_come_back(graph: Graph) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(legality, "FLOATS", (torch.float64,))
        found = fused(graph)
        verify(found, axes=True)
        assert not any(fault(traced(body_of(node))) for node in fused_nodes(found))
    inputs = sample_inputs(graph, seed=1)
    for own, other in zip(found.run(inputs), graph.run(inputs), strict=True):
        assert torch.equal(own, other) or torch.allclose(own, other, equal_nan=True)
    unfuse(found)
    verify(found, axes=True)
    assert sorted(str(found).splitlines()) == sorted(str(graph).splitlines())
