"""Factors multiplied back: where the device is predicted to be faster, or always."""

import pytest
import torch
from torch import nn

import regauge
from regauge.ir.errors import PassError


def factors(width: int, rank: int) -> regauge.Graph:
    torch.manual_seed(0)
    down, other = nn.Linear(width, rank, bias=False), nn.Linear(width, rank)
    model = nn.Sequential(down, nn.Linear(rank, width), nn.ReLU(), other, nn.Linear(rank, width))
    return regauge.capture(model.eval(), (torch.randn(2, width),), dynamic={0: {0: "batch"}})


@pytest.mark.parametrize(("width", "text", "layers"), [
    (64, "unfactorize", 2),  # two starts cost more than reading 16 KB
    (512, "unfactorize", 4),  # and less than reading 1 MB
    (512, "unfactorize{when=always}", 2),
    (512, "unfactorize{device={overhead=1e-3}}", 2),
    (64, "simplify", 4),  # fewer parameters and MACs
])  # fmt: skip
def test_chains_are_merged_where_it_is_faster(width: int, text: str, layers: int) -> None:
    graph = factors(width, width // 8)
    found = regauge.optimize(graph, text)
    x = torch.randn(3, width)
    assert sum(node.op == "linear" for node in found.nodes) == layers
    torch.testing.assert_close(found.run(x)[0], graph.run(x)[0], rtol=1e-4, atol=1e-5)


def test_a_device_is_for_predicted_times() -> None:
    with pytest.raises(PassError, match="leave device out"):
        regauge.optimize(factors(64, 8), "unfactorize{when=always,device=gpu}")


def test_convolutions_of_single_places_and_the_reverse_of_factorize() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 12, 3, stride=2))
    graph = regauge.capture(model.eval(), (torch.randn(2, 16, 9, 9),))
    parted = regauge.optimize(graph, "factorize{rank=8,form=low-rank}")
    found = regauge.optimize(parted, "unfactorize{when=always}")
    x = torch.randn(2, 16, 9, 9)
    assert [len(g.nodes) for g in (graph, parted, found)] == [3, 5, 3]
    torch.testing.assert_close(found.run(x)[0], parted.run(x)[0], rtol=1e-4, atol=1e-5)
