"""AdaRound and FlexRound: blocks of layers, and codes that are learned from what these give."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import regauge
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.quantization.blocks import ends_of_blocks
from regauge.passes.quantization.grid import Form, Grid
from regauge.passes.quantization.learned_codes import Divided, UpOrDown


class Pooled(nn.Module):
    """A residual branch, and a convolution whose result is only read as a mean over places."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x + self.two(self.one(x).relu())).relu()
        return self.head(self.three(x).relu().mean((2, 3)))


def images(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(48, 8, 1, 1, generator=generator) + torch.randn(48, 8, 6, 6, generator=generator)


def pooled() -> Graph:
    torch.manual_seed(0)
    return regauge.capture(Pooled().eval(), (images(0)[:2],), dynamic={0: {0: "batch"}})


def layers(graph: Graph) -> list[Layer]:
    return [layer for layer in map(layer_of, graph.nodes) if layer is not None]


def test_blocks_end_where_one_value_goes_on() -> None:
    """The layer in front of the branch, the branch with its sum, what is pooled with its mean, and the head."""
    graph = pooled()
    ends = ends_of_blocks(graph, layers(graph))
    assert [graph.nodes[end].op for end in ends] == ["relu", "relu", "mean", "linear"]
    own = [layer_of(node) is not None for node in graph.nodes]
    assert [sum(own[first:last]) for first, last in pairwise([0, *(end + 1 for end in ends)])] == [1, 1, 1, 1]


@pytest.mark.parametrize("way", [UpOrDown, Divided])
@pytest.mark.parametrize("grid", [Grid(3), Grid(3, symmetric=False)])
def test_learning_starts_at_the_nearest_codes(way: type, grid: Grid) -> None:
    """Gradients reach what is learned."""
    layer = layers(pooled())[0]
    start = Form(grid, 36).rounded(layer.matrix(layer.weight.tensor.detach()))
    codes = way(layer, start)
    assert torch.equal(codes.coded().codes, start.codes)
    assert float((codes.coded().values - start.values).abs().max()) < 1e-6
    (codes.values() * torch.randn(start.codes.shape)).sum().backward()
    assert all(bool(learned.grad.abs().sum() > 0) for learned in codes.learns)


def shares(method: str, steps: int) -> float:
    """The error on images not seen, as a share of that of the nearest codes."""
    graph, batches = pooled(), [(part,) for part in images(1).split(16)]
    (y,) = graph.run((images(2),))
    errors = []
    for options in ("nearest", f"{method},steps={steps}"):
        small = regauge.optimize(graph, f"quantize{{scheme=w3,target=reference,method={options}}}", data=batches)
        (found,) = small.run((images(2),))
        errors.append(float((found - y).square().sum()))
    return errors[1] / errors[0]


@pytest.mark.parametrize(("method", "most"), [("adaround", 0.6), ("flexround", 0.6)])
def test_learned_codes_lose_less_than_the_nearest(method: str, most: float) -> None:
    assert shares(method, 200) < most


def test_what_is_refused() -> None:
    with pytest.raises(PassError, match="steps are of method=adaround"):
        regauge.optimize(pooled(), "quantize{scheme=w4,steps=10}")
    with pytest.raises(PassError, match="needs data for method=flexround"):
        regauge.optimize(pooled(), "quantize{scheme=w4,method=flexround}")
