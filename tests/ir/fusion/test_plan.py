"""Planning of regions: what becomes one kernel, what is refused and why, and that the regions compute the graph."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from decoder_block import decoder_block
from random_graphs import BATCH, graphs
from random_regions import streams
from regauge.ir.edit import Builder
from regauge.ir.fusion import legality
from regauge.ir.fusion import plan as planning
from regauge.ir.fusion.legality import fault
from regauge.ir.fusion.plan import Plan, plan_fusion
from regauge.ir.fusion.region import Region, trace
from regauge.ir.graph import Graph, Parameter, Value
from regauge.ir.interpret import Interpreter
from regauge.ir.roofline import DEVICES
from regauge.ir.sample_inputs import sample_inputs
from region_reference import run_region


def ops(plan: Plan) -> list[list[str]]:
    return [[node.op for node in region.nodes] for region in plan.regions]


def reasons(plan: Plan) -> Counter[str]:
    return Counter(refusal.reason for refusal in plan.refusals)


def test_a_decoder_block_becomes_products_with_what_stands_behind_them_and_rows() -> None:
    plan = plan_fusion(decoder_block())
    kinds = Counter(region.kind for region in plan.regions)
    assert kinds == {"contraction": 7, "attention": 1, "row reduction": 2, "pointwise": 1}
    assert (len(plan.kernels), plan.kernels_before) == (11, 27)
    rotary = ["neg", "concat", "mul", "add"]  # of keys by itself, of queries before attention
    assert rotary in ops(plan) and [*rotary, "matmul", "mul", "softmax", "matmul"] in ops(plan)
    assert ["linear", "silu", "mul"] in ops(plan) and ops(plan).count(["linear", "add"]) == 2
    assert plan.bytes < 0.5 * plan.bytes_before


def test_with_few_queries_attention_turns_its_keys_itself() -> None:
    plan = plan_fusion(decoder_block(tokens=64))
    (attention,) = (region for region in plan.regions if region.kind == "attention")
    assert [node.op for node in attention.nodes].count("concat") == 2 and len(plan.kernels) == 10
    assert list(attention.names.values()) == ["b0", "b1", "m0", "n0", "k0", "k0_0", "k0_1", "s0"]


def test_what_is_between_two_contractions_may_be_no_softmax() -> None:
    def reason(op: str, **options: object) -> str | None:
        graph, build = built()
        q, k, v = (build.input(name, (8, 64, 32), torch.float32) for name in "qkv")
        scores = build.matmul(q, build.permute(k, dims=(0, 2, 1)))
        graph.outputs = [build.matmul(build(op, scores, **options), v)]
        return fault(trace(graph.nodes, graph.outputs))

    assert reason("softmax", dim=2) is None
    assert reason("log_softmax", dim=2) == "its second contraction is not of what the softmax gives and of values"
    assert reason("softmax", dim=1) == "its second contraction is not of what the softmax gives and of values"
    assert reason("rms_norm", normalized_shape=(64,)) == "it would have two contractions, and no softmax between them"
    assert reason("relu") == "it would have two contractions"


def test_one_query_reads_keys_and_values_as_codes() -> None:
    def kernels(length: int) -> list[list[str]]:
        graph, build = built()
        q = build.input("q", (1, 8, length, 64), torch.float16)
        k, v = (build.input(name, (1, 8, 4096, 64), torch.uint8) for name in "kv")
        scales = [build.input(name, (1, 8, 4096, 1), torch.float16) for name in ("k_scale", "v_scale")]
        read = [build.mul(build.cast(x, dtype=torch.float16), scale) for x, scale in zip((k, v), scales, strict=True)]
        graph.outputs = [build.attention(q, *read, scale=0.125)]
        return ops(plan_fusion(graph))

    assert kernels(1) == [["cast", "mul", "cast", "mul", "attention"]]
    assert kernels(4096) == [["cast", "mul", "cast", "mul"], ["attention"]]  # they would be read back for each tile


def test_heads_that_are_repeated_are_read_once_in_attention() -> None:
    graph, build = built()
    q, k, v = (build.input(name, (1, heads, 256, 64), torch.float16) for name, heads in (("q", 8), ("k", 2), ("v", 2)))
    k = build.repeat_interleave(k, repeats=4, dim=1)
    v = build.reshape(build.expand(build.unsqueeze(v, dim=2), shape=(1, 2, 4, 256, 64)), shape=(1, 8, 256, 64))
    graph.outputs = [build.attention(q, k, v, scale=0.125)]
    (region,) = plan_fusion(graph).regions
    assert [load.value.value.name for load in region.loads] == ["k", "unsqueeze", "q"]
    assert {name: dim.size for dim, name in region.names.items() if name[0] in "bm"} == {"b0": 2, "m0": 4, "m1": 256}


def test_attention_is_refused_where_more_is_wanted_of_it_than_one_pass_gives() -> None:
    def reason(width: int, *, weights: bool = False) -> str | None:
        graph, build = built()
        q, k, v = (build.input(name, (8, 64, width), torch.float32) for name in "qkv")
        shares = build.softmax(build.matmul(q, build.permute(k, dims=(0, 2, 1))), dim=2)
        graph.outputs = [build.matmul(shares, v), *([shares] if weights else [])]
        return fault(trace(graph.nodes, graph.outputs))

    assert reason(256) is None
    assert reason(257) == "a program holds heads of 256 numbers at most"
    assert reason(32, weights=True) == "its weights are read behind the second contraction"


def test_refusals_are_told_with_their_bytes() -> None:
    graph, build = built()
    x = build.linear(build.input("x", (512, 512), torch.float16), build.parameter("w", torch.zeros(512, 512).half()))
    graph.outputs = [build.linear(build.softmax(x, dim=1), build.parameter("v", torch.zeros(512, 512).half()))]
    assert reasons(plan_fusion(graph)) == {
        "it would reduce rows beside a contraction, of which a program has only a tile": 2
    }
    graph, build = built()
    graph.outputs = [build.relu(build.cumsum(build.input("x", (64, 64), torch.float32), dim=1))]
    assert reasons(plan_fusion(graph)) == {"what cumsum computes for one index is not stated": 1}


def built() -> tuple[Graph, Builder]:
    graph = Graph("g")
    return graph, Builder(graph)


def test_what_a_path_leaves_and_comes_back_to_is_not_one_kernel() -> None:
    graph, build = built()
    x = build.relu(build.input("x", (64, 64), torch.float32))
    graph.outputs = [build.add(x, build.cumsum(x, dim=1))]
    plan = plan_fusion(graph)
    assert ops(plan) == [["relu"], ["add"]]
    assert reasons(plan)["a path leaves them and comes back"] == 1


def test_a_path_comes_back_through_a_kernel_that_begins_before_and_ends_behind() -> None:
    graph, build = built()
    x, y = (build.input(name, (64, 64), kind) for name, kind in (("x", torch.float32), ("y", torch.float16)))
    w, v = build.relu(y), build.relu(x)
    u = build.add(build.cumsum(v, dim=1), w)
    graph.outputs = [u, build.add(v, build.cumsum(w, dim=1))]
    plan = plan_fusion(graph)
    assert sorted(ops(plan)) == [["add"], ["relu"], ["relu", "add"]]
    assert reasons(plan)["a path leaves them and comes back"] == 1


def test_norms_of_several_streams_are_one_kernel_where_these_are_short() -> None:
    def kernels(rows: int) -> list[list[str]]:
        graph, build = built()
        gain = build.parameter("gain", torch.ones(256))
        streams = [build.input(name, (rows, 256), torch.float32) for name in "xyz"]
        normed = [build.rms_norm(stream, gain, normalized_shape=(256,), eps=1e-6) for stream in streams]
        graph.outputs = [build.cumsum(one, dim=1) for one in normed]
        return ops(plan_fusion(graph))

    assert kernels(64) == [["rms_norm"] * 3] and kernels(2**18) == [["rms_norm"]] * 3


def test_what_both_read_is_read_once_by_regions_beside_one_another() -> None:
    graph, build = built()
    x, y, gate = (build.input(name, (4, 5, 64), torch.float32) for name in ("x", "y", "gate"))
    turned = build.permute(build.mul(build.relu(y), gate), dims=(1, 0, 2))
    graph.outputs = [build.mul(build.tanh(x), gate), build.cumsum(turned, dim=0)]
    plan = plan_fusion(graph)
    (region,) = plan.regions
    assert [dim.size for dim in region.loops] == [4, 5, 64] and len(region.loads) == 3
    assert plan.bytes == (5 + 2) * 4 * 5 * 64 * 4  # three read and two written; the sum reads and writes


def test_what_one_needs_of_the_other_keeps_them_apart() -> None:
    graph, build = built()
    x = build.relu(build.input("x", (64, 64), torch.float32))
    graph.outputs = [build.tanh(build.cumsum(x, dim=1))]
    assert ops(plan_fusion(graph)) == [["relu"], ["tanh"]]
    other = build.sigmoid(build.input("y", (64, 64), torch.float32))
    graph.outputs.append(other)
    assert ops(plan_fusion(graph)) == [["relu", "sigmoid"], ["tanh"]]


def test_what_is_laid_end_to_end_is_one_loop_and_its_segments() -> None:
    graph, build = built()
    x, y = (build.input(name, (64, size), torch.float32) for name, size in (("x", 48), ("y", 16)))
    joined = build.tanh(build.concat(build.relu(x), y, dim=1))
    graph.outputs = [joined, build.sum(joined, dims=(1,))]
    first, second = plan_fusion(graph).regions
    assert [node.op for node in first.nodes] == ["relu", "concat", "tanh"]
    assert list(first.names.values()) == ["i0", "i1", "i1_0", "i1_1"]
    assert reasons(plan_fusion(graph))["it would join segments beside a reduction"] == 1


def test_an_axis_that_is_only_broadcast_is_not_reduced() -> None:
    graph, build = built()
    wide = build.expand(build.relu(build.input("x", (1, 64), torch.float32)), shape=(8, 64))
    graph.outputs = [build.sum(wide, dims=(0, 1))]
    assert fault(trace(graph.nodes)) == "it would reduce an axis that is only broadcast"
    assert ops(plan_fusion(graph, DEVICES["cpu"])) == [["relu"], ["sum"]]


def test_a_value_beside_itself_is_in_no_region() -> None:
    graph, build = built()
    x = build.relu(build.input("x", (64, 48), torch.float32))
    graph.outputs = [build.concat(x, x, dim=1)]
    assert ops(plan_fusion(graph)) == [["relu"]]


def test_a_reshape_across_boundaries_is_in_no_region_but_one_that_splits_is() -> None:
    graph, build = built()
    x = build.relu(build.input("x", (64, 48), torch.float32))
    split = build.tanh(build.permute(build.reshape(x, shape=(64, 4, 12)), dims=(1, 0, 2)))
    mixed = build.reshape(build.permute(split, dims=(1, 0, 2)), shape=(48, 64))
    graph.outputs = [build.sigmoid(mixed)]
    plan = plan_fusion(graph)
    assert ops(plan) == [["relu", "reshape", "permute", "tanh"], ["sigmoid"]]
    assert plan.regions[0].layouts[split] == tuple((dim,) for dim in plan.regions[0].loops)


def test_a_product_of_a_value_with_itself_has_two_loops_for_one_axis() -> None:
    graph, build = built()
    x = build.input("x", (64, 48), torch.float32)
    graph.outputs = [build.matmul(x, build.permute(x, dims=(1, 0)))]
    (region,) = plan_fusion(graph).regions
    assert [dim.size for dim in region.loops] == [64, 64, 48] and region.kind == "contraction"
    assert list(region.names.values()) == ["m0", "n0", "k0"]


def test_group_norm_and_what_follows_reduce_over_the_same_loops() -> None:
    graph, build = built()
    x = build.input("x", (2, 6, 40), torch.float32)
    weight, bias = (build.parameter(name, torch.ones(6)) for name in ("w", "b"))
    graph.outputs = [build.silu(build.group_norm(build.mul(x, 2.0), weight, bias, num_groups=2))]
    (region,) = plan_fusion(graph).regions
    assert region.kind == "row reduction"
    assert list(region.names.values()) == ["i0", "i1", "r0", "r1"]
    assert [dim.size for dim in region.loops] == [2, 2, 3, 40]


def test_a_prologue_is_refused_where_it_would_be_computed_again() -> None:
    def products(columns: int) -> list[list[str]]:
        graph, build = built()
        x = build.silu(build.input("x", (4096, 64), torch.float32))
        graph.outputs = [build.linear(x, build.parameter("w", torch.zeros(columns, 64)))]
        return ops(plan_fusion(graph))

    assert products(64) == [["silu", "linear"]] and products(512) == [["silu"], ["linear"]]


def test_integers_and_double_precision_are_left_to_the_runtime() -> None:
    graph, build = built()
    x = build.input("x", (64, 64), torch.float64)
    graph.outputs = [build.relu(build.neg(x))]
    plan = plan_fusion(graph)
    assert not plan.regions and len(plan.kernels) == 2
    assert "kernels compute in half and single precision" in plan.refusals[0].reason


def test_long_rows_are_read_again_so_that_less_is_gained() -> None:
    def moved(op: str, columns: int, **options: object) -> float:
        graph, build = built()
        graph.outputs = [build(op, build.input("x", (8, columns), torch.float32), **options)]
        return plan_fusion(graph).bytes / (8 * columns * 4)

    assert (moved("softmax", 4096, dim=1), moved("softmax", 32768, dim=1)) == (2, 3)  # the sum, the quotient, a write
    norm = {"normalized_shape": (32768,), "eps": 1e-5}
    assert moved("layer_norm", 32768, **norm) == 4  # the mean, the variance, the quotient, a write


def test_one_long_row_is_not_given_to_one_program() -> None:
    def joined(rows: int, device: str) -> bool:
        graph, build = built()
        x = build.abs(build.input("x", (rows, 2**22 // rows), torch.float32))
        graph.outputs = [build.sum(x, dims=(1,))]
        return len(plan_fusion(graph, DEVICES[device]).regions) == 1

    assert joined(1024, "gpu") and not joined(1, "gpu") and joined(1, "cpu")


def test_planning_takes_time_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []
    trace = planning.trace
    monkeypatch.setattr(planning, "trace", lambda nodes, *rest: traced.append(len(nodes)) or trace(nodes, *rest))

    def work(length: int) -> int:
        graph, build = built()
        x = build.input("x", (64, 64), torch.float32)
        for _ in range(length):
            x = build.relu(x)
        graph.outputs = [x]
        traced.clear()
        assert all(len(region.nodes) <= legality.MOST_NODES for region in plan_fusion(graph).regions)
        return sum(traced)

    assert work(400) < 2.2 * work(200)


@hypothesis_settings(max_examples=25)
@given(graphs(), st.sampled_from(sorted(DEVICES)))
def test_regions_of_random_graphs_compute_what_the_graph_does(graph: Graph, device: str) -> None:
    check_regions(graph, device)


@pytest.mark.nightly
@hypothesis_settings(max_examples=1000)
@given(graphs(), st.sampled_from(sorted(DEVICES)))
def test_regions_of_many_random_graphs_compute_what_the_graph_does(graph: Graph, device: str) -> None:
    check_regions(graph, device)


@hypothesis_settings(max_examples=40)
@given(streams(torch.float64))
def test_streams_beside_one_another_compute_what_the_graph_does(graph: Graph) -> None:
    (region,) = check_regions(graph, "gpu").regions
    assert len(region.outputs) == len(graph.outputs)


def check_regions(graph: Graph, device: str) -> Plan:
    """Every step has what it reads when its turn comes, and gives what the interpreter gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(legality, "FLOATS", (torch.float64,))
        plan = plan_fusion(graph, DEVICES[device], at={BATCH: 2})
    known: dict[Value, torch.Tensor] = {}
    inputs = sample_inputs(graph, seed=1)
    known.update(zip(graph.inputs, inputs.values() if isinstance(inputs, dict) else inputs, strict=True))
    known.update((parameter, parameter.tensor) for parameter in graph.parameters.values())
    outer = set(graph.nodes)
    expected = dict(known)
    Interpreter(graph, hook=lambda node, results: expected.update(zip(node.outputs, results, strict=False))).run(inputs)
    ran = []
    for step in plan.steps:
        nodes = step.nodes if isinstance(step, Region) else (step,)
        ran += nodes
        for node in nodes:
            for _, value in node.operands():
                assert isinstance(value, Parameter) or value in known or value.producer in nodes, f"{node} is too early"
        if isinstance(step, Region):
            found = run_region(step, known)
            for value, tensor in found.items():
                torch.testing.assert_close(tensor, expected[value].double(), rtol=1e-6, atol=1e-8, equal_nan=True)
            known.update(found)
        else:
            known.update((value, expected[value]) for value in step.outputs if value in expected)
    assert Counter(ran) == Counter(outer)
    assert all(output in known for output in graph.outputs if isinstance(output, Value))
    return plan
