"""Experts: grouped products against torch, in the three ways they are evaluated; expert widths stay free."""

import pytest
import torch
from torch import nn, randn
from torch._subclasses.fake_tensor import FakeTensorMode

from cutting import cut_all, free_sizes
from regauge.ir.edit import Builder
from regauge.ir.errors import OperatorError
from regauge.ir.graph import Graph
from regauge.ir.operator import find_aten
from regauge.ir.ops.experts import grouped_mm

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
