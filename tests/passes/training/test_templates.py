"""``Templates``: trained as they are mixed, and grown into both networks and new mixtures between them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regauge
from layered_networks import redrawn
from regauge.frontends.capture import capture
from regauge.ir.errors import PassError, RegaugeWarning
from regauge.ir.graph import Graph
from regauge.training import Templates


class Classifier(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 6, 3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv2(F.relu(self.norm(self.conv1(x)))))
        return self.head(x.mean((2, 3)))


def two() -> tuple[Classifier, Classifier, Graph, torch.Tensor]:
    torch.manual_seed(0)
    first, second = (redrawn(Classifier()).eval() for _ in range(2))
    with torch.no_grad():
        for own in second.parameters():
            own.add_(torch.randn_like(own), alpha=0.3)
    x = torch.randn(4, 3, 8, 8)
    return first, second, capture(first, (x,), dynamic={0: {0: "batch"}}), x


def test_mixtures_are_the_weights_that_were_there_and_are_trained_in_their_place() -> None:
    model, _, graph, x = two()
    wanted = model(x).detach()
    templates = Templates(model, graph)
    assert [own.name for own in templates.mixtures] == ["conv1.weight", "conv2.weight", "head.weight"]
    torch.testing.assert_close(model(x), wanted)
    optimizer, target = torch.optim.SGD(templates.parameters(), lr=0.05), torch.zeros(4, 5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    found, trained = model(x).detach(), templates.finish()
    torch.testing.assert_close(trained.run(x)[0], found)
    torch.testing.assert_close(model(x), found)  # without the templates, too


def test_with_zeros_between_it_is_the_mean_of_both() -> None:
    first, second, graph, x = two()
    wanted = (first(x) + second(x)).detach() / 2
    wide = Templates(first, graph).grow(Templates(second, graph, seed=1), scale=0.0)
    torch.testing.assert_close(wide.run(x)[0], wanted)
    assert wide.parameters["conv2.weight"].shape == (12, 8, 3, 3) and wide.parameters["head.weight"].shape == (5, 12)
    assert wide.parameters["norm.running_var"].shape == (8,)


def test_between_both_stand_mixtures_at_right_angles_to_those_that_were_learned() -> None:
    first, second, graph, x = two()
    whole = [own.conv2.weight.detach().clone() for own in (first, second)]
    ends = Templates(first, graph, count=3), Templates(second, graph, count=3, seed=1)
    mixtures = [own.mixtures[graph.parameters["conv2.weight"]] for own in ends]
    for mixture in mixtures:
        assert abs(float(mixture.other() @ mixture.coefficients.detach())) < 1e-6
        torch.testing.assert_close(mixture.other().norm(), torch.tensor(1.0))
    upper, lower = (mixture.tensor(mixture.other()).detach() for mixture in mixtures)
    wide = ends[0].grow(ends[1])
    weight = wide.parameters["conv2.weight"].tensor
    for found, own in zip((weight[:6, :4], weight[6:, 4:]), whole, strict=True):
        torch.testing.assert_close(found, own)
    assert torch.equal(weight[:6, 4:], upper) and torch.equal(weight[6:, :4], lower)
    module = wide.to_torch().train()
    module(x).square().sum().backward()
    assert all(own.grad is not None and own.grad.abs().max() > 0 for own in module.conv2.parameters())


def test_what_cannot_grow_is_said() -> None:
    first, second, graph, _ = two()
    with pytest.raises(PassError, match="count=1"):
        Templates(first, graph, count=1)
    other = Classifier(8).eval()
    with pytest.raises(PassError, match="other names or sizes"):
        Templates(first, graph).grow(Templates(other, capture(other, (torch.randn(2, 3, 8, 8),))))
    linear = nn.Linear(3, 2)
    with pytest.raises(PassError, match="no layer that can become wider"):
        Templates(linear, regauge.capture(linear, (torch.randn(2, 3),)))


class Tied(nn.Module):
    """The width of the stream cannot grow: the weight that reads it is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return F.linear(x + self.down(F.gelu(self.up(x))), self.table.weight)


def test_means_of_whole_layers_are_warned_of() -> None:
    """The mean of two embeddings fits neither network, and nothing said so."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (2, 4))
    ends = [Templates(model, capture(model, (tokens,))) for model in (Tied().eval(), Tied().eval())]
    with pytest.warns(RegaugeWarning, match=r"nothing of table.weight grows .*tied to another use.* mean of both"):
        ends[0].grow(ends[1])
