"""Ranks found while training: what is planted is found, and the finished graph is what was trained."""

import pytest
import torch
from torch import nn

import regauge
from regauge.training import OrderedDropout, full_rank_factors


def planted(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """512 inputs and what a map of this rank, with singular values that fall from 3 to 1.5, makes of them."""
    u, _ = torch.linalg.qr(torch.randn(10, rank))
    v, _ = torch.linalg.qr(torch.randn(12, rank))
    x = torch.randn(512, 12)
    return x, x @ (u * torch.linspace(3, 1.5, rank) @ v.T).T


def factored() -> tuple[nn.Module, regauge.Graph]:
    graph = full_rank_factors(regauge.capture(nn.Linear(12, 10).eval(), (torch.randn(2, 12),)))
    model = graph.to_torch()
    return model, regauge.capture(model, (torch.randn(2, 12),), dynamic={0: {0: "batch"}})


def test_factors_of_full_rank_compute_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    graph = regauge.capture(model.eval(), (torch.randn(2, 3, 8, 8),))
    found = full_rank_factors(graph)
    x = torch.randn(2, 3, 8, 8)
    assert [node.op for node in found.nodes] == ["conv", "conv", "relu", "conv", "conv"]
    torch.testing.assert_close(found.run(x)[0], graph.run(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 5])
def test_ordered_dropout_finds_the_rank(rank: int) -> None:
    x, y = planted(rank)
    model, graph = factored()
    sparsifier = OrderedDropout(model, graph, learning=600, penalty=2e-3, tolerance=0.02)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(800):
        part = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        (nn.functional.mse_loss(model(x[part]), y[part]) + sparsifier.loss()).backward()
        optimizer.step()
        sparsifier.step()
    model.eval()
    found = sparsifier.finish()
    assert list(sparsifier.ranks.values()) == [rank] and found.find("down.weight").shape == (rank, 12)
    torch.testing.assert_close(found.run(x)[0], model(x).detach(), rtol=1e-4, atol=1e-5)
    assert float((found.run(x)[0] - y).norm() / y.norm()) < 1e-3
    values = found.find("down.weight").tensor.square().sum(1)
    torch.testing.assert_close(values, torch.linspace(3, 1.5, rank), rtol=1e-3, atol=1e-3)  # singular, in order
