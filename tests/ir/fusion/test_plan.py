"""Planning of regions: what becomes one kernel, what is refused and why, and that the regions compute the graph."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from decoder_block import decoder_block
from quantized_graphs import gated_layer, quantized
from random_graphs import BATCH, graphs
from random_regions import streams
from regauge.ir.edit import Builder
from regauge.ir.fusion import legality
from regauge.ir.fusion import plan as planning
from regauge.ir.fusion.legality import fault
from regauge.ir.fusion.plan import Plan, plan_fusion
from regauge.ir.fusion.plan_rows import plan_summary, refusal_rows
from regauge.ir.fusion.region import Region
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph, Parameter, Value
from regauge.ir.roofline import DEVICES
from regauge.ir.running.interpret import Interpreter
from regauge.ir.running.sample_inputs import sample_inputs
from region_reference import run_region


def ops(plan: Plan) -> list[list[str]]:
    return [[node.op for node in region.nodes] for region in plan.regions]


def reasons(plan: Plan) -> Counter[str]:
    return Counter(refusal.reason for refusal in plan.refusals)


def test_a_decoder_block_becomes_products_with_what_stands_behind_them_and_rows() -> None:
    plan = plan_fusion(decoder_block())
    kinds = Counter(region.kind for region in plan.regions)
    assert kinds == {"contraction": 4, "attention": 1, "row reduction": 2, "pointwise": 1}
    assert (len(plan.kernels), plan.kernels_before) == (8, 27)
    rotary = ["neg", "concat", "mul", "mul", "add"]  # of keys by itself, of queries before attention
    assert rotary in ops(plan) and [*rotary, "matmul", "mul", "softmax", "matmul"] in ops(plan)
    assert ["linear", "linear", "silu", "mul"] in ops(plan) and ops(plan).count(["linear", "add"]) == 2
    assert plan.bytes < 0.3 * plan.bytes_before


def test_a_block_of_37_operators_becomes_10_kernels() -> None:
    """Of the sizes of Llama 7B, with norms and softmax written out.

    A turned half is two nodes here, and so are the root of a norm and what is added below it: 41 nodes.
    """
    plan = plan_fusion(decoder_block(2048, 4096, 32, 11008, written_out=True))
    assert plan.kernels_before == 37 + 4 and len(plan.kernels) == 10
    assert plan.bytes_before > 6 * plan.bytes
    kinds = Counter(region.kind for region in plan.regions)
    assert kinds == {"contraction": 6, "attention": 1, "row reduction": 2, "pointwise": 1}
    worst, second, *_ = plan.refusals
    assert (worst.bytes, worst.value.name, worst.reader.op) == (180355072, "mul_11", "linear")
    assert worst.reason == "it would have two contractions" and second.reason.startswith("keys or values would be")
    rows = refusal_rows(plan.refusals)
    assert rows[1][0] == "180MB" and len(rows) == len(plan.refusals) + 1 and plan_summary(plan).startswith("10 kernels")


def test_refusals_are_told_with_their_bytes() -> None:
    graph, build = built()
    x = build.linear(build.input("x", (512, 512), torch.float16), build.parameter("w", torch.zeros(512, 512).half()))
    graph.outputs = [build.linear(build.log_softmax(x, dim=1), build.parameter("v", torch.zeros(512, 512).half()))]
    assert reasons(plan_fusion(graph)) == {
        "it would reduce rows beside a contraction, of which a program has only a tile": 2
    }
    graph, build = built()
    graph.outputs = [build.relu(build.cumsum(build.input("x", (64, 64), torch.float32), dim=1))]
    assert reasons(plan_fusion(graph)) == {"what cumsum computes for one index is not stated": 1}


@pytest.mark.parametrize("scheme", ["w4", "w8", "w8a8", "fp8"])
def test_products_of_few_bits_are_kernels_where_others_are_left_to_the_library(scheme: str) -> None:
    plan = plan_fusion(quantized(scheme), contractions=False)
    products = [region for region in plan.regions if region.contractions]
    assert [len(region.contractions) for region in products] == [2, 1]  # gate and up are one
    assert not any(node.op in ("linear", "matmul", "unpack") for node in plan.kernels if not isinstance(node, Region))
    left = plan_fusion(gated_layer(), contractions=False)
    assert not any(region.contractions for region in left.regions)
    assert reasons(left)[planning.LIBRARY] == 4


def test_a_weight_of_few_bits_is_made_floats_where_rows_are_many() -> None:
    few, many = (plan_fusion(quantized("w4", rows), contractions=False) for rows in (512, 513))
    assert len(few.kernels) == 2 and sum(bool(region.contractions) for region in many.regions) == 0
    assert reasons(many)["with more than 512 rows a library is faster, with the weight as floats"] == 3
    both = plan_fusion(quantized("w8a8", 513), contractions=False)  # integers are multiplied faster than floats
    assert sum(len(region.contractions) for region in both.regions) == 3


def test_queries_keys_and_values_are_one_product_where_that_is_shorter() -> None:
    def kernels(rows: int, wide: int = 64) -> list[list[str]]:
        graph, build = built()
        x = build.input("x", (rows, 64), torch.float16)
        weights = [build.parameter(name, torch.zeros(wide, 64, dtype=torch.float16)) for name in "qkvo"]
        graph.outputs = [build.linear(x, weight) for weight in weights]
        return ops(plan_fusion(graph))

    assert kernels(16) == [["linear"] * 3, ["linear"]]  # a program holds no more than three tiles
    assert kernels(2**16, 4096) == [["linear"]] * 4


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


def test_regions_beside_one_another_that_stay_apart_are_told() -> None:
    graph, build = built()
    x = build.input("x", (2**18, 256), torch.float32)
    graph.outputs = [build.tanh(x), build.softmax(x, dim=1), build.cumsum(build.sigmoid(x), dim=0)]
    found = {refusal.reason: refusal.bytes for refusal in plan_fusion(graph).refusals}
    assert found["with what else reads it: they have other loops"] == 2**18 * 256 * 4


def test_what_one_needs_of_the_other_keeps_them_apart() -> None:
    graph, build = built()
    x = build.relu(build.input("x", (64, 64), torch.float32))
    graph.outputs = [build.tanh(build.cumsum(x, dim=1))]
    assert ops(plan_fusion(graph)) == [["relu"], ["tanh"]]
    other = build.sigmoid(build.input("y", (64, 64), torch.float32))
    graph.outputs.append(other)
    assert ops(plan_fusion(graph)) == [["relu", "sigmoid"], ["tanh"]]


def test_what_is_laid_end_to_end_is_one_loop_in_which_each_part_has_its_place() -> None:
    graph, build = built()
    x, y = (build.input(name, (64, size), torch.float32) for name, size in (("x", 48), ("y", 16)))
    joined = build.tanh(build.concat(build.relu(x), y, dim=1))
    graph.outputs = [joined, build.sum(joined, dims=(1,))]
    (region,) = plan_fusion(graph).regions
    assert [node.op for node in region.nodes] == ["relu", "concat", "tanh", "sum"]
    assert list(region.names.values()) == ["i0", "r0", "s0", "s1"]  # s0 and s1 say where the segments end
    second = region.loads[1].value
    ((_, place),) = second.moved
    assert place.steps == ((region.loops[1], 1),) and place.start({dim: dim.size for dim in region.measured}) == -48


def test_an_axis_that_is_only_broadcast_is_not_reduced() -> None:
    graph, build = built()
    wide = build.expand(build.relu(build.input("x", (1, 64), torch.float32)), shape=(8, 64))
    graph.outputs = [build.sum(wide, dims=(0, 1))]
    assert fault(trace(graph.nodes)) == "it would reduce an axis that is only broadcast"
    assert ops(plan_fusion(graph, DEVICES["cpu"])) == [["relu"], ["sum"]]


def test_a_value_beside_itself_is_computed_at_both_places() -> None:
    graph, build = built()
    x = build.relu(build.input("x", (64, 48), torch.float32))
    graph.outputs = [build.concat(x, x, dim=1)]
    (region,) = plan_fusion(graph).regions
    assert [node.op for node in region.nodes] == ["relu", "concat"] and len(region.loads) == 2
    assert plan_fusion(graph).bytes == 3 * 64 * 48 * 4  # read once, written twice


def test_a_slice_is_read_at_its_place_and_only_that_is_moved() -> None:
    graph, build = built()
    x = build.tanh(build.input("x", (64, 48), torch.float32))
    first, second = (build.slice(x, dim=1, start=start, end=start + 24) for start in (0, 24))
    graph.outputs = [build.mul(first, second)]
    plan = plan_fusion(graph)
    (region,) = plan.regions
    assert [dim.size for dim in region.loops] == [64, 24] and len(region.loads) == 2
    assert plan.bytes == 3 * 64 * 24 * 4  # a half of x each


def test_a_convolution_takes_what_stands_behind_it_and_a_pad_before_it() -> None:
    graph, build = built()
    x = build.pad(build.input("x", (2, 8, 16, 16), torch.float16), pads=((0, 0), (0, 0), (0, 1), (0, 1)), value=0)
    weight = build.parameter("w", torch.zeros(8, 1, 3, 3, dtype=torch.float16))
    y = build.conv(x, weight, stride=(2, 2), padding=(0, 0), dilation=(1, 1), groups=8)
    graph.outputs = [build.silu(y)]
    (region,) = plan_fusion(graph).regions
    assert [node.op for node in region.nodes] == ["pad", "conv", "silu"] and region.has_windows
    assert list(region.names.values()) == ["i0", "i1", "i2", "i3", "r0", "r1", "s0", "s1"]
    places = region.loads[0].value.places.values()
    assert [[step for _, step in place.steps] for place in places] == [[1], [1], [2, 1], [2, 1]]


def test_what_stands_before_a_great_window_is_not_computed_for_each_of_its_indices() -> None:
    def planned(size: int) -> Plan:
        graph, build = built()
        x = build.silu(build.input("x", (2, 8, 32, 32), torch.float16))
        weight = build.parameter("w", torch.zeros(8, 1, size, size, dtype=torch.float16))
        graph.outputs = [build.conv(x, weight, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=8)]
        return plan_fusion(graph)

    assert ops(planned(3)) == [["silu", "conv"]] and ops(planned(5)) == [["silu"], ["conv"]]
    assert "more than 16 indices" in planned(5).refusals[0].reason


def test_an_embedding_is_looked_up_by_the_norm_of_it() -> None:
    graph, build = built()
    table = build.parameter("table", torch.zeros(1000, 64))
    tokens = build.input("tokens", (4, 32), torch.int64)
    graph.outputs = [build.rms_norm(build.embedding(table, tokens), normalized_shape=(64,), eps=1e-6)]
    plan = plan_fusion(graph)
    (region,) = plan.regions
    assert [node.op for node in region.nodes] == ["embedding", "rms_norm"]
    assert plan.bytes == 4 * 32 * 8 + 2 * 4 * 32 * 64 * 4  # numbers, and of the table what they pick
    doubled = build.embedding(table, build.add(tokens, tokens))
    graph.outputs = [build.relu(doubled)]
    assert ops(plan_fusion(graph))[-1] == ["embedding", "relu"]  # numbers are computed by a kernel of the runtime


def test_a_graph_without_rows_is_planned() -> None:
    graph = Graph("nothing")
    build = Builder(graph)
    x = build.input("x", (0, 4), torch.float32)
    graph.outputs = [build.mul(build.softmax(build.gelu(x), dim=1), 2)]
    assert [len(region.nodes) for region in plan_fusion(graph).regions] == [3]


def test_a_softmax_that_would_be_computed_for_each_place_again_is_left() -> None:
    graph, build = built()
    x = build.softmax(build.input("x", (4096, 256), torch.float32), dim=1)
    graph.outputs = [build.concat(x, build.input("y", (4096, 256), torch.float32), dim=1)]
    assert sorted(ops(plan_fusion(graph))) == [["concat"], ["softmax"]]


def test_terms_at_other_places_do_not_multiply_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regauge.ir.fusion.terms.MOST_TERMS", 50)
    graph, build = built()
    x = build.input("x", (64, 48), torch.float32)
    for cut in range(1, 9):
        parts = [build.slice(x, dim=1, start=a, end=b) for a, b in ((cut, 48), (0, cut))]
        x = build.neg(build.concat(*parts, dim=1))
    graph.outputs = [x]
    plan = plan_fusion(graph)
    assert reasons(plan)["it would compute more than 50 terms at other places"]


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


def test_what_is_read_once_is_joined_before_what_is_read_twice() -> None:
    """A square goes with the mean that alone reads it, and not with the product that gives what is squared."""
    graph, build = built()
    x = build.input("x", (512, 1024), torch.float16)
    y = build.add(build.linear(x, build.parameter("w", torch.zeros(1024, 1024).half())), x)
    root = build.rsqrt(build.add(build.mean(build.mul(y, y), dims=(1,), keepdim=True), 1e-6))
    graph.outputs = [build.mul(y, root), y]
    plan = plan_fusion(graph)
    assert ops(plan) == [["linear", "add"], ["mul", "mean", "add", "rsqrt", "mul"]]
    size = 512 * 1024 * 2
    assert plan.bytes == 1024 * 1024 * 2 + 2 * size + 2 * size
