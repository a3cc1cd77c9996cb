"""Reordered graphs compute the same: of random networks, and of attention, whose heads are a factor of an axis."""

import pytest
import torch
from torch import nn

import regauge
from regauge.ir.dims.reorder import reorder
from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph
from regauge.ir.verify import verify


def all_reordered(graph: Graph) -> tuple[Graph, int]:
    """Every free Dim in a random order."""
    generator = torch.Generator().manual_seed(0)
    orders = {g.dim: torch.randperm(int(g.size), generator=generator).tolist() for g in graph.groups() if g.free}
    return reorder(graph, orders), len(orders)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.before, self.after = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.layer(self.before(x)))


def shuffled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ChannelShuffle(4),
        nn.Conv2d(12, 4, 1), nn.Flatten(), nn.Linear(4 * 16, 3),
    )  # fmt: skip


@pytest.mark.parametrize(("model", "shape"), [(Encoder, (2, 7, 5)), (shuffled, (2, 3, 8, 8))])
def test_every_free_dim_may_be_reordered(model: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).double()
    graph = regauge.capture(model().double().eval(), (x,))
    found, count = all_reordered(graph)
    verify(found)
    assert count >= 4
    (y,), (z,) = graph.run(x), found.run(x)
    assert float((y - z).abs().max()) <= 1e-9 * float(y.abs().max())
    changed = sum(not torch.equal(p.tensor, graph.parameters[name].tensor) for name, p in found.parameters.items())
    assert changed >= 6


def test_an_order_names_each_index_of_a_free_dim_once() -> None:
    graph = regauge.capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.randn(2, 4),))
    with pytest.raises(GraphError, match="name each of them once"):
        reorder(graph, {"0.weight:0": [0, 1, 2, 3, 4, 4]})
    with pytest.raises(GraphError, match="name each of them once"):
        reorder(graph, {"0.weight:0": [0, 1]})
    with pytest.raises(GraphError, match="cannot be reordered"):
        reorder(graph, {"2.weight:0": [1, 0]})
