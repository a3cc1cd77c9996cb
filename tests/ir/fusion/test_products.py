"""Contractions taken apart: codes, scales of the sum and of its groups, digits that share a byte."""

import pytest
import torch

from kernel_forms import form_graph
from regauge.ir.edit import Builder
from regauge.ir.fusion.legality import fault
from regauge.ir.fusion.products import Products, few_bit_sides, integer_range, products_of
from regauge.ir.fusion.region import Region
from regauge.ir.fusion.tracing import trace
from regauge.ir.graph import Graph


def region_of(graph: Graph) -> Region:
    region = trace(graph.nodes, graph.outputs)  # type: ignore[arg-type]
    assert fault(region) is None
    return region


def found(name: str) -> tuple[Region, Products]:
    region = region_of(form_graph(name, torch.float16))
    return region, products_of(region)


def test_scales_of_outputs_multiply_the_sum() -> None:
    region, products = found("int8_weight")
    (product,) = products.all
    assert (
        not products.groups and not product.whole and (product.left.few_bits, product.right.few_bits) == (False, True)
    )
    (scale,) = product.scales
    assert scale.axes.isdisjoint(product.contraction.over) and product.right.core.op == "load"
    assert few_bit_sides(region) == [(False, True)]


def test_groups_are_loops_of_their_own_and_digits_too() -> None:
    region, products = found("int4_weight")
    names = {region.names[dim] for dim in products.groups}
    assert names == {"k0"} and [(region.names[dim], dim.size) for dim in products.digits] == [("k2", 2)]
    assert integer_range(products.all[0].right.core) == (-255, 15)  # a digit, less a zero point of 8 bits


def test_integers_on_both_sides_are_multiplied_as_such() -> None:
    assert found("int8_both")[1].all[0].whole and found("int8_both_groups")[1].all[0].whole
    assert not found("int8_both_static")[1].all[0].whole  # less a zero point it takes 9 bits
    assert found("float8_both")[1].all[0].left.few_bits


def test_two_products_of_one_factor_have_one_left_tile() -> None:
    _, products = found("gate_and_up_int4")
    first, second = products.all
    assert first.left.core is second.left.core and first.right.core is not second.right.core


@pytest.mark.parametrize("group", [4, 32])
def test_what_shares_a_scale_is_long_or_entries_are_scaled(group: int) -> None:
    graph = Graph("g")
    build = Builder(graph)
    x = build.input("x", (8, 64), torch.float16)
    q = build.parameter("q", torch.ones(16, 64, dtype=torch.int8), trainable=False)
    scale = build.parameter("s", torch.ones(16, 64 // group, dtype=torch.float16))
    graph.outputs = [build.linear(x, build.dequantize(q, scale, axis=1, block_size=group))]
    products = products_of(region_of(graph))
    assert bool(products.groups) == (group == 32) == bool(products.all[0].scales)


def test_sums_of_more_than_32_bits_are_not_made_of_integers() -> None:
    def whole(depth: int) -> bool:
        graph = Graph("g")
        build = Builder(graph)
        scale = build.parameter("s", torch.ones(()))
        q = build.input("w", (16, depth), torch.int8)
        x = build.dequantize(build.input("x", (8, depth), torch.int8), scale)
        graph.outputs = [build.linear(x, build.dequantize(q, scale))]
        return products_of(region_of(graph)).all[0].whole

    assert whole(2**17) and not whole(2**17 + 16)


def test_digits_that_are_no_whole_bits_are_refused() -> None:
    graph = Graph("g")
    build = Builder(graph)
    q = build.unpack(build.parameter("q", torch.ones(16, 8, dtype=torch.uint8), trainable=False), base=3, count=5)
    graph.outputs = [build.linear(build.input("x", (8, 40), torch.float32), build.cast(q, dtype=torch.float32))]
    assert fault(trace(graph.nodes)) == "numbers that share a byte have parts of a bit"
