"""Offsets in one block of memory: nothing that is alive together overlaps, and the block is at least the peak."""

from itertools import combinations

import torch
from hypothesis import given

from random_networks import networks
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.ir.memory.activations import activation_bytes
from regauge.ir.memory.plan import ALIGNMENT, MemoryPlan, peak_rows, plan_memory, plan_summary


def hourglass() -> Graph:
    """Wide, narrow, wide: widths 8, 64, 16, 64, 8 of f32[2, width]."""
    graph = Graph("hourglass")
    build = Builder(graph)
    value = build.input("x", (2, 8), torch.float32)
    for name, inputs, outputs in (("a", 8, 64), ("b", 64, 16), ("c", 16, 64), ("d", 64, 8)):
        value = build.linear(value, build.parameter(name, torch.randn(outputs, inputs)), name=f"y_{name}")
    graph.outputs = [value]
    return graph


def test_memory_is_used_again() -> None:
    plan = plan_memory(hourglass())
    assert plan.peak == plan.arena == 2 * 4 * (64 + 16)
    assert {block.value.name: block.offset for block in plan.blocks} == {
        "x": 512,
        "y_a": 0,
        "y_b": 512,
        "y_c": 0,
        "y_d": 512,
    }
    assert plan_summary(plan) == (
        "640B are alive at the peak, at y_b = linear; one block of 640B holds the run, 1.28KB if nothing were reused"
    )
    assert [row[:2] for row in peak_rows(plan, 1)[1:]] == [["512B", "%y_a: f32[2,64]"]]


def check(plan: MemoryPlan) -> None:
    for a, b in combinations(plan.blocks, 2):
        apart = a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
        assert apart or not a.overlaps(b) or not (a.bytes and b.bytes)
    assert all(block.offset % ALIGNMENT == 0 for block in plan.blocks)
    assert plan.arena >= plan.peak


@given(networks())
def test_random_networks(graph: Graph) -> None:
    plan = plan_memory(graph)
    check(plan)
    assert plan.peak == activation_bytes(graph)[1]
