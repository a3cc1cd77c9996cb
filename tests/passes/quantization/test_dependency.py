"""Blocks of layers that depend on one another, by the entropy of what they give."""

import torch
from torch import nn

import regauge
from regauge.passes.calibration.layers import layer_of
from regauge.passes.quantization.dependency import dependent_blocks, entropy_of


def test_the_entropy_of_levels() -> None:
    assert entropy_of(torch.ones(256).double()) == 8
    assert entropy_of(torch.tensor([1.0, 0.0, 1.0, 2.0]).double()) == 1.5
    assert entropy_of(torch.tensor([5.0, 0.0]).double()) == 0


def test_the_chain_is_cut_where_entropy_is_low() -> None:
    """What the second layer gives is nearly always one of few numbers; a parallel layer joins whom it reads."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three, self.four = (nn.Linear(8, 8) for _ in range(4))
            self.beside = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.one(x)
            return self.four(self.three(self.two(h.relu()))) + self.beside(h)

    torch.manual_seed(0)
    model = Chain().eval()
    with torch.no_grad():
        model.two.weight.zero_()
        model.two.weight[0, 0] = 1.0  # one of eight numbers varies
    graph = regauge.capture(model, (torch.zeros(2, 8),), dynamic={0: {0: "batch"}})
    layers = [layer for node in graph.nodes if (layer := layer_of(node)) is not None]
    batches = [(torch.randn(256, 8),)]

    def names(most: int) -> list[list[str]]:
        blocks = dependent_blocks(graph, layers, batches, most)
        return [sorted(layer.weight.name.removesuffix(".weight") for layer in block) for block in blocks]

    assert sorted(names(3)) == [["beside", "one", "two"], ["four", "three"]]
    assert all(len(block) == 1 for block in names(1)) and len(names(1)) == 5
