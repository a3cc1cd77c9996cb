"""Products of one value whose columns are not as many: queries, keys and values of grouped heads in one kernel."""

import pytest
import torch

from regauge.backends.torch_module.kernels import kernel_of, with_kernels
from regauge.backends.triton_kernels.files import grid_formula
from regauge.backends.triton_kernels.kernel import triton_kernel
from regauge.ir.edit import Builder, remove_dead
from regauge.ir.errors import FusionError
from regauge.ir.fusion.fuse import fuse, traced
from regauge.ir.fusion.fused import body_of, fused_nodes
from regauge.ir.fusion.plan import plan_fusion
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph, Value

WIDTHS = (256, 64, 64)


def projections(widths: tuple[int, ...] = WIDTHS, *, bits: int = 8, block: int | None = None) -> Graph:
    """Maps of x[4, 128] to so many columns each, their weights of 8 bits, or as they are."""
    graph = Graph("projections")
    build = Builder(graph)
    x = build.input("x", (4, 128), torch.float16)

    def weight(place: int, width: int) -> Value:
        if bits > 8:
            return build.parameter(f"w{place}", torch.randn(width, 128).half())
        q = build.parameter(f"q{place}", torch.randint(-127, 128, (width, 128)).to(torch.int8), trainable=False)
        groups = (width,) if block is None or place else (width, 128 // block)
        scale = build.parameter(f"s{place}", torch.rand(groups).half() / 64)
        options = {"axis": 0} if len(groups) == 1 else {"axis": 1, "block_size": block}
        return build.dequantize(q, scale, **options)

    found = [build.linear(x, weight(place, width)) for place, width in enumerate(widths)]
    heads = [build.permute(build.reshape(y, shape=(4, int(y.shape[1]) // 32, 32)), dims=(1, 0, 2)) for y in found]
    graph.outputs = [build.mul(heads[0], 0.125), *heads[1:]]
    return graph


@pytest.mark.parametrize("bits", [8, 16])
def test_projections_of_other_widths_are_one_kernel(bits: int) -> None:
    plan = plan_fusion(projections(bits=bits))
    (region,) = [step for step in plan.kernels]
    assert region.kind == "contraction" and len(region.contractions) == 3  # type: ignore[union-attr]
    columns, size = sum(WIDTHS), 1 if bits == 8 else 2
    scales = columns * 2 if bits == 8 else 0
    assert plan.bytes == 4 * 128 * 2 + columns * 128 * size + scales + 4 * columns * 2


def test_what_is_left_to_a_library_stays_there() -> None:
    assert not any(len(region.nodes) > 1 for region in plan_fusion(projections(bits=16), contractions=False).regions)
    (region,) = plan_fusion(projections(), contractions=False).regions
    assert len(region.parts) == 3 and all(len(part) == 1 for part in region.parts)


def test_products_as_wide_as_one_another_share_tiles() -> None:
    for count, parts in ((3, [[3]]), (4, [[3], [1]])):  # of four tiles a program would hold too many
        graph = projections((64,) * count)
        graph.outputs = [node.output for node in graph.nodes if node.op == "linear"]
        remove_dead(graph)
        regions = plan_fusion(graph, contractions=False).regions
        assert [[len(part) for part in region.parts] for region in regions] == parts


def test_weights_with_scales_at_other_places_stay_apart() -> None:
    plan = plan_fusion(projections((256, 64), block=32), contractions=False)
    assert [len(region.contractions) for region in plan.regions] == [1, 1]
    assert any("two contractions" in refusal.reason for refusal in plan.refusals)


def test_a_result_of_two_parts_is_refused() -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (4, 128), torch.float32)
    y, z = (build.linear(x, build.parameter(f"w{n}", torch.zeros(n, 128))) for n in (32, 48))
    graph.outputs = [build.mul(build.unsqueeze(y, dim=2), build.unsqueeze(z, dim=1))]
    with pytest.raises(FusionError, match="not those that the contraction gives"):
        triton_kernel(trace(graph.nodes, graph.outputs))  # type: ignore[arg-type]
    assert [len(region.contractions) for region in plan_fusion(graph).regions] == [2, 0]


def test_a_region_of_parts_is_a_node_and_has_a_kernel_again() -> None:
    graph = projections()
    (region,) = plan_fusion(graph, contractions=False).regions
    fuse(Builder(graph), region, "fused")
    (node,) = fused_nodes(graph)
    assert len(traced(body_of(node)).parts) == 3
    source = kernel_of(body_of(node), "fused").source("contraction")
    formula = grid_formula(source, {"BLOCK_M": 16, "BLOCK_N": 64})
    assert formula.startswith("cdiv(size_m0, 16) * (cdiv(") and formula.count(", 64)") == 3


def test_a_module_calls_one_operator_for_all_of_them() -> None:
    graph = projections()
    found = with_kernels(graph)
    assert len(found.operators) == 1 and not found.left
    x = torch.randn(4, 128).half()
    for own, other in zip(graph.to_torch(kernels="triton")(x), graph.to_torch()(x), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-2, atol=1e-2)
