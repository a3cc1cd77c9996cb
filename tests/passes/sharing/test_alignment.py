"""Blocks brought into one basis: the function stays, and what only differs by a basis becomes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from layered_networks import Decoder, GroupedDecoder, ParallelBlock, ResidualNetwork, encoder, ids, images, redrawn
from random_networks import networks
from regauge.frontends.capture import capture
from regauge.ir.graph import Graph
from regauge.ir.verify import verify
from regauge.passes.sharing.alignment import aligned
from regauge.passes.sharing.structure import repeated


def in_one_basis(graph: Graph) -> Graph:
    for found in repeated(graph):
        graph = aligned(graph, [[weight.name for weight in own] for own in found.weights], by="test")
    return graph


def apart(graph: Graph, weight: str) -> float:
    """The squared distance of a weight of the second block from that of the first one, by its own square."""
    first, second = (graph.parameters[f"blocks.{block}.{weight}"].tensor.double() for block in (0, 1))
    return float((first - second).square().sum() / first.square().sum())


def expect_same(graph: Graph, other: Graph, x: torch.Tensor, within: float) -> None:
    (wanted,), (found,) = graph.run((x,)), other.run((x,))
    assert float((wanted - found).abs().max()) < within * float(wanted.abs().max())


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "decoder": (Decoder, ids),
    "parallel": (lambda: Decoder(kind=ParallelBlock), ids),
    "rotary, grouped, gated": (GroupedDecoder, ids),
    "encoder": (encoder, lambda: torch.randn(2, 5, 16, dtype=torch.float64)),
    "convolutions": (ResidualNetwork, lambda: images().double()),
}


@pytest.mark.parametrize("name", MODELS)
def test_function_stays(name: str) -> None:
    make, inputs = MODELS[name]
    graph = capture(redrawn(make()).double(), (inputs(),))
    found = in_one_basis(graph)
    verify(found)
    assert any(edit.by == "test" for edit in found.history)
    expect_same(graph, found, inputs(), 1e-10)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(networks())
def test_random_networks_stay_the_same(graph: Graph) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found = in_one_basis(graph)
    verify(found)
    for wanted, result in zip(graph.run((x,)), found.run((x,)), strict=True):
        assert float((wanted - result).abs().max()) <= 1e-8 * float(wanted.abs().max())


class Scrambled(Decoder):
    """Two blocks that compute the same, the second in another basis wherever one is free."""

    def __init__(self) -> None:
        super().__init__(blocks=2)
        redrawn(self)
        first, second = self.blocks
        second.load_state_dict(first.state_dict())
        generator = torch.Generator().manual_seed(3)
        self.double()
        with torch.no_grad():
            order = torch.randperm(32, generator=generator)
            second.fc1.weight.copy_(first.fc1.weight[order])
            second.fc1.bias.copy_(first.fc1.bias[order])
            second.fc2.weight.copy_(first.fc2.weight[:, order])
            weight, bias = (t.unflatten(0, (3, 2, 8)).flip(1) for t in (first.qkv.weight, first.qkv.bias))
            out = first.proj.weight.unflatten(1, (2, 8)).flip(1)
            maps = torch.randn(2, 2, 8, 8, generator=generator).double() / 4 + torch.eye(8)
            turned = [maps[0], torch.linalg.inv(maps[0]).mT, maps[1]]
            second.qkv.weight.copy_(torch.stack([m @ w for m, w in zip(turned, weight, strict=True)]).flatten(0, 2))
            moved = [(m @ b[..., None])[..., 0] for m, b in zip(turned, bias, strict=True)]
            second.qkv.bias.copy_(torch.stack(moved).flatten())
            second.proj.weight.copy_((out.movedim(0, 1) @ torch.linalg.inv(maps[1])).movedim(0, 1).flatten(1))
            gain = torch.rand(16, generator=generator).double() + 0.5
            second.ln2.weight.mul_(gain)
            second.ln2.bias.mul_(gain)
            second.fc1.weight.div_(gain)


def test_blocks_that_differ_by_their_basis_become_one() -> None:
    graph = capture(Scrambled().eval(), (ids(),))
    weights = ["qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"]
    assert all(apart(graph, weight) > 0.5 for weight in weights)
    found = in_one_basis(graph)
    expect_same(graph, found, ids(), 1e-10)
    assert [apart(found, weight) < 1e-16 for weight in (*weights, "qkv.bias", "fc1.bias", "ln2.bias")] == 7 * [True]


class Positive(nn.Module):
    """Two blocks with ReLU, the second one's channels scaled and in another order."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 8)) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        redrawn(self).double()
        order, scale = torch.randperm(20), 2.0 ** torch.randint(-4, 5, (20,)).double()
        with torch.no_grad():
            self.blocks[1].load_state_dict(self.blocks[0].state_dict())
            self.blocks[1][1].weight.copy_(self.blocks[0][1].weight[order] * scale[:, None])
            self.blocks[1][1].bias.copy_(self.blocks[0][1].bias[order] * scale)
            self.blocks[1][3].weight.copy_(self.blocks[0][3].weight[:, order] / scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_scales_of_channels_are_taken_out_before_they_are_matched() -> None:
    torch.manual_seed(0)
    graph, x = capture(Positive().eval(), (torch.randn(3, 8).double(),)), torch.randn(3, 8).double()
    found = in_one_basis(graph)
    expect_same(graph, found, x, 1e-12)
    assert apart(graph, "1.weight") > 0.5 and apart(found, "1.weight") < 1e-20 and apart(found, "3.weight") < 1e-20
