"""What kernels take of a GPU, told without compiling, beside what the compiler says."""

import importlib.util
from dataclasses import replace

import pytest
import torch

import regauge
from decoder_block import decoder_block
from kernel_forms import FORMS, form_graph
from regauge.backends.triton_kernels.compile import compile_kernel
from regauge.backends.triton_kernels.footprint import footprint
from regauge.backends.triton_kernels.kernel import Kernel
from regauge.backends.triton_kernels.screen import GPUS
from regauge.ir.edit import Builder
from regauge.ir.fusion.footprint import Footprint
from regauge.ir.fusion.plan import plan_fusion
from regauge.ir.fusion.region import Region
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
SPILLS = "would spill"


def gated_streams(count: int, columns: int, rows: int = 4096) -> Graph:
    """A softmax over a sum of streams, each of which is read again behind it: a thread keeps its part of all."""
    graph = Graph("streams")
    build = Builder(graph)
    streams = [build.input(f"x{place}", (rows, columns), torch.bfloat16) for place in range(count)]
    total = streams[0]
    for stream in streams[1:]:
        total = build.add(total, stream)
    found = build.softmax(total, dim=1)
    for stream in streams[1:]:
        found = build.mul(build.add(found, stream), stream)
    graph.outputs = [found]
    return graph


def many_results(count: int) -> Graph:
    """Results that each wait for the last one."""
    graph = Graph("results")
    build = Builder(graph)
    found = build.input("x", (4096, 4096), torch.bfloat16)
    graph.outputs = []
    for _ in range(count):
        found = build.tanh(found)
        graph.outputs.append(found)
    return graph


def product(results: int, rows: int = 4096) -> Graph:
    """A product, and results that are computed from it."""
    graph = Graph("product")
    build = Builder(graph)
    found = build.linear(
        *(build.input(name, (size, 4096), torch.bfloat16) for name, size in (("x", rows), ("w", 4096)))
    )
    graph.outputs = [found]
    for _ in range(results - 1):
        graph.outputs.append(build.mul(build.relu(graph.outputs[-1]), found))
    return graph


def region_of(graph: Graph) -> Region:
    return trace(graph.nodes, graph.outputs)  # type: ignore[arg-type]


def taken(graph: Graph, **options: object) -> Footprint:
    region = region_of(graph)
    return footprint(region, {dim: int(dim.size) for dim in region.sized}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMS)
def test_no_form_of_kernels_counts_as_one_that_spills(name: str) -> None:
    """The compiler says of all of them that they do not (docs/benchmarks.md)."""
    assert taken(form_graph(name, torch.bfloat16, 512, 256)).spilled == 0


@needs_triton
@pytest.mark.parametrize(("streams", "columns"), [(2, 16384), (4, 16384), (4, 8192)])
def test_registers_are_those_of_the_compiler_where_much_is_kept(streams: int, columns: int) -> None:
    graph = gated_streams(streams, columns)
    region, found = region_of(graph), taken(graph)
    sizes = {dim: int(dim.size) for dim in region.sized}
    compiled = compile_kernel(Kernel(region, "kernel", "fused").source(), sizes, "sm_80")
    assert abs(compiled.registers - found.registers) <= 4
    assert (compiled.spilled > 0) == (found.spilled > 0) == ((streams, columns) == (4, 16384))


def test_results_are_kept_until_they_are_stored() -> None:
    few, many = taken(many_results(8)), taken(many_results(40))
    assert (few.registers, few.spilled) == (16 + 8 * 8, 0)
    assert (many.registers, many.spilled) == (255, 4 * (16 + 40 * 8 - 255))
    assert many.resident == 2 and few.resident == 6  # 65536 registers, 128 threads of a program


def test_a_small_register_file_spills_and_holds_fewer_programs() -> None:
    graph = gated_streams(2, 4096)
    usual = GPUS["sm_80"]
    assert taken(graph, gpu=usual).spilled == 0
    small = replace(usual, registers=8192)  # 32 for each of 256 threads
    assert taken(graph, gpu=small) == replace(taken(graph, gpu=small), registers=32, spilled=4 * (48 - 32), resident=1)

    def on_small(region: Region, sizes: object) -> Footprint:
        return footprint(region, sizes, gpu=small)  # type: ignore[arg-type]

    refused = [refusal for refusal in plan_fusion(graph, footprints=on_small).refusals if SPILLS in refusal.reason]
    assert refused and all(refusal.bytes > 0 for refusal in refused)
    (whole,) = plan_fusion(graph, footprints=footprint).kernels
    assert isinstance(whole, Region) and len(plan_fusion(graph, footprints=on_small).kernels) > 1


def test_the_pass_splits_what_would_spill_and_says_so() -> None:
    for columns, spills in ((16384, True), (8192, False)):
        found = regauge.optimize(gated_streams(4, columns, rows=128), "fuse")
        (entry,) = found.report.passes
        assert any(SPILLS in reason for reason in entry.left) == spills


def test_a_product_keeps_the_tiles_of_its_results() -> None:
    assert taken(product(2)).spilled == 0 and taken(product(2)).launches == 1
    assert taken(product(7)).spilled > 0  # 704 bytes, the compiler says for sm_80, and nothing of five results
    assert taken(product(5)).spilled == 0


def test_few_rows_take_a_second_launch() -> None:
    assert taken(product(2, rows=16)).launches == 2


def test_the_plan_of_a_decoder_block_stays() -> None:
    graph = decoder_block(2048, 4096, 32, 11008, written_out=True)
    plain, counted = plan_fusion(graph), plan_fusion(graph, footprints=footprint)
    assert [str(step) for step in counted.steps] == [str(step) for step in plain.steps]
    assert (len(counted.kernels), counted.bytes) == (10, plain.bytes)
    norms = [counted.footprints[region] for region in counted.regions if region.kind == "row reduction"]
    assert [(norm.registers, norm.resident, norm.reached) for norm in norms] == [(48, 5, 1.0)] * 2
