"""Experts: grouped products against torch, in the three ways they are evaluated; expert widths stay free."""

import pytest
import torch
from torch import nn, randn
from torch._subclasses.fake_tensor import FakeTensorMode

from cutting import cut_all, free_sizes
from headed_networks import expect_masked
from regauge.ir.dims.groups import free_groups
from regauge.ir.dims.majors import majors_of
from regauge.ir.dims.resize import resize
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Graph
from regauge.ir.operator import find_aten
from regauge.ir.ops.experts import grouped_mm
from regauge.ir.running.interpret import run
from regauge.optimize import optimize

OFFSETS = torch.tensor([2, 2, 6], dtype=torch.int32)


def expected(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:2] @ weight[0], x[2:6] @ weight[2], torch.zeros(len(x) - 6, weight.shape[2])])


def test_values() -> None:
    x, weight = randn(7, 8), randn(3, 8, 16)
    torch.testing.assert_close(grouped_mm(x, weight, OFFSETS), expected(x, weight))
    x = x[:6]  # torch leaves rows behind the last offset undefined
    torch.testing.assert_close(grouped_mm(x, weight, OFFSETS), nn.functional.grouped_mm(x, weight, offs=OFFSETS))


class Grouped(nn.Module):
    def forward(self, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return grouped_mm(x, weight, offsets)


def test_it_can_be_exported_and_needs_no_data_for_its_shape() -> None:
    x, weight = randn(7, 4), randn(3, 4, 5)
    program = torch.export.export(Grouped(), (x, weight, OFFSETS))
    torch.testing.assert_close(program.module()(x, weight, OFFSETS), expected(x, weight))
    assert grouped_mm(x.to("meta"), weight.to("meta"), OFFSETS.to("meta")).shape == (7, 5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in (x, weight, OFFSETS)]
        assert grouped_mm(*fakes).shape == (7, 5)


def test_gradients_flow() -> None:
    x, weight = randn(7, 4, requires_grad=True), randn(3, 4, 5, requires_grad=True)
    grouped_mm(x, weight, OFFSETS).sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert not weight.grad[1].any() and weight.grad[2].any()


def test_the_width_of_every_expert_is_free_and_their_number_is_not() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (6, 4), torch.float32)
    residual = build.linear(x, build.parameter("first", randn(8, 4)))
    offsets = build.constant(OFFSETS, "offsets")
    hidden = build.relu(build.grouped_mm(residual, build.parameter("up", randn(3, 8, 6)), offsets))
    down = build.grouped_mm(hidden, build.parameter("down", randn(3, 6, 8)), offsets)
    graph.outputs = [build.linear(build.add(residual, down), build.parameter("last", randn(2, 8)))]
    assert sorted(free_sizes(graph).values()) == [6, 8]
    cut_all(graph, [randn(6, 4)])


def test_aten_forms() -> None:
    found = find_aten("_grouped_mm")
    assert found is not None and found[1] is not None
    graph = Graph()
    build = Builder(graph)
    x, weight = build.input("x", (3, 6, 4), torch.float32), build.parameter("w", randn(3, 4, 5))
    assert found[1](build, x, weight).producer.op == "matmul"
    with pytest.raises(OperatorError, match="bias"):
        found[1](build, x, weight, None, weight)
    custom = find_aten("transformers::grouped_mm_fallback")
    assert custom is not None and custom[0].name == "grouped_mm"


def experts(second: str = "offsets") -> Graph:
    """Rows sorted by expert through two products, with an activation between them."""
    torch.manual_seed(0)
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (60, 4), torch.float64)
    offsets = {name: build.constant(torch.tensor([15, 20, 60]), name) for name in ("offsets", "others")}
    hidden = build.relu(build.grouped_mm(x, build.parameter("up", randn(3, 4, 6).double()), offsets["offsets"]))
    if second == "turned":
        hidden, second = build.flip(hidden, dims=(0,)), "offsets"
    graph.outputs = [build.grouped_mm(hidden, build.parameter("down", randn(3, 6, 5).double()), offsets[second])]
    return graph


def test_each_expert_keeps_a_width_of_its_own() -> None:
    graph = experts()
    small = resize(graph, {"up:2": [[0, 1], [2, 5], [3, 4]]})
    up = graph.parameters["up"].tensor
    torch.testing.assert_close(
        small.parameters["up"].tensor, torch.stack([up[0, :, :2], up[1, :, [2, 5]], up[2, :, 3:5]])
    )
    expect_masked(graph, small, [randn(60, 4).double()])


def test_rows_of_several_axes_stand_for_experts_too() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.reshape(build.input("x", (2, 3, 4), torch.float64), shape=(6, 4))
    offsets = build.constant(OFFSETS, "offsets")
    hidden = build.grouped_mm(x, build.parameter("up", randn(3, 4, 12).double()), offsets)
    gate, value = build.split(hidden, sizes=(6, 6), dim=1)
    turned = build.permute(build.parameter("down", randn(3, 5, 6).double()), dims=(0, 2, 1))
    graph.outputs = [build.grouped_mm(build.mul(build.silu(gate), value), turned, offsets)]
    small = resize(graph, {"down:2": [[0, 1], [2, 5], [3, 4]]})
    expect_masked(graph, small, [randn(2, 3, 4).double()])


@pytest.mark.parametrize("second", ["others", "turned"])
def test_rows_that_are_sorted_otherwise_stand_for_no_expert(second: str) -> None:
    graph = experts(second)
    (dim,) = (group.dim for group in free_groups(graph))
    assert majors_of(graph, [dim]) == {dim: ()}


def test_experts_are_refitted_to_what_each_keeps() -> None:
    graph = experts()
    for expert, width in enumerate(([0, 1, 2], [2, 3, 4], [1, 3, 5])):  # what each hardly uses
        graph.parameters["down"].tensor[expert, width] *= 1e-2
    data = [randn(60, 4).double() for _ in range(4)]
    errors = {}
    for options in ("", ",separate=false", ",compensate=false"):
        small = optimize(graph, f"prune{{ratio=0.5{options}}}", data=data)
        x = randn(60, 4, generator=torch.Generator().manual_seed(1)).double()
        errors[options] = float((run(small, [x])[0] - run(graph, [x])[0]).norm())
    assert errors[""] < errors[",compensate=false"] < 0.2 * errors[",separate=false"], errors
