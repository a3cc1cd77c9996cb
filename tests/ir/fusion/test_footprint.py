"""What a kernel takes of a device decides, beside the roofline, whether a region gains."""

from collections.abc import Mapping

import pytest
import torch

from regauge.ir.dims.extents import Dim
from regauge.ir.edit import Builder
from regauge.ir.errors import FusionError
from regauge.ir.fusion.footprint import Footprint, Footprints
from regauge.ir.fusion.plan import Plan, plan_fusion
from regauge.ir.fusion.plan_rows import plan_rows, refusal_rows
from regauge.ir.fusion.region import Region
from regauge.ir.graph import Graph

BYTES = 4096 * 4096 * 4


def three(rows: int = 4096) -> Graph:
    """tanh(relu(x) * y): each node moves more than a kernel of all."""
    graph = Graph("three")
    build = Builder(graph)
    x, y = (build.input(name, (rows, 4096), torch.float32) for name in "xy")
    graph.outputs = [build.tanh(build.mul(build.relu(x), y))]
    return graph


def always(footprint: Footprint | None, least: int = 2) -> Footprints:
    """The same of each region of so many nodes, and nothing of smaller ones."""

    def footprints(region: Region, sizes: Mapping[Dim, int]) -> Footprint | None:
        assert set(sizes) == set(region.sized)
        return footprint if len(region.nodes) >= least else None

    return footprints


def ops(plan: Plan) -> list[list[str]]:
    return [[node.op for node in region.nodes] for region in plan.regions]


def test_a_region_whose_kernel_would_spill_is_split_with_the_reason_and_its_bytes() -> None:
    graph = three()
    fits, spills = (plan_fusion(graph, footprints=always(Footprint(spilled=n), 3)) for n in (0, 48))
    assert ops(fits) == [["relu", "mul", "tanh"]] and fits.refusals == ()
    assert len(spills.regions) == 2 and max(map(len, ops(spills))) == 2
    (refusal,) = spills.refusals
    assert refusal.reason == "its kernel would spill 48 bytes of registers of each thread"
    assert refusal.bytes == 2 * BYTES  # what lies between the two would be neither written nor read
    assert refusal_rows(spills.refusals)[1] == ["134MB", refusal.value.name, refusal.reader.label, refusal.reason]


def test_programs_that_are_too_few_flip_a_choice() -> None:
    """A kernel of the first two moves 3 tensors, and apart they move 5: that takes longer with a quarter of the
    bandwidth, and not with three."""
    graph = three()
    enough, few = (plan_fusion(graph, footprints=always(Footprint(resident=n, reached=n / 4))) for n in (3, 1))
    assert ops(enough) == [["relu", "mul", "tanh"]]
    assert ops(few) == [["relu"], ["mul"], ["tanh"]]
    reasons = {refusal.reason for refusal in few.refusals}
    assert reasons == {
        "it would take longer: a processor holds 1 of its programs at a time, which reach 25% of its speed"
    }


def test_launches_count() -> None:
    small = three(1)
    assert len(plan_fusion(small, footprints=always(Footprint(launches=3))).regions) == 3
    assert len(plan_fusion(small, footprints=always(Footprint(launches=1))).regions) == 1
    assert len(plan_fusion(three(), footprints=always(Footprint(launches=3))).regions) == 1  # bytes save more


def test_what_can_be_no_kernel_of_its_sizes_is_refused() -> None:
    def raises(region: Region, sizes: Mapping[Dim, int]) -> Footprint | None:
        raise FusionError("too many indices")

    plan = plan_fusion(three(), footprints=raises)
    assert {refusal.reason for refusal in plan.refusals} == {"too many indices"} and len(plan.regions) == 3


@pytest.mark.parametrize("known", [False, True])
def test_the_plan_shows_what_is_known_of_kernels(known: bool) -> None:
    plan = plan_fusion(three(), footprints=always(Footprint(registers=40, resident=12) if known else None))
    figures = (["registers", "programs"], ["40", "12"]) if known else ([], [])
    assert plan_rows(plan) == [
        ["kernel", "loops", *figures[0], "nodes", "results"],
        ["pointwise", "i0=4096 i1=4096", *figures[1], "relu mul tanh", "tanh"],
    ]
