"""Means and RMSNorms over Dims that were cut, kept what they were in the masked original."""

import pytest
import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).double()


def masked(graph: Graph, pruned: Graph, x: torch.Tensor) -> torch.Tensor:
    """The original with what was removed set to zero: it is found by value, each weight occurring once."""
    weights = {}
    for name, parameter in graph.parameters.items():
        kept = pruned.parameters[name].tensor
        weights[name] = torch.where(torch.isin(parameter.tensor, kept), parameter.tensor, 0.0)
    return regauge.ir.running.interpret.run(graph, (x,), weights=weights)[0]


class Normed(nn.Module):
    """A residual width with an RMSNorm, with or without a gain, and a mean over it beside."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 12, bias=False)
        self.norm = nn.RMSNorm(12, eps=0.1, elementwise_affine=affine)
        self.leave = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.enter(x))
        return self.leave(self.norm(h)) + h.mean(-1, keepdim=True)


@pytest.mark.parametrize("affine", [True, False])
def test_rms_norms_and_means_are_the_masked_ones(affine: bool) -> None:
    torch.manual_seed(0)
    model = Normed(affine).double()
    if affine:
        nn.init.normal_(model.norm.weight)
    graph = capture(model, (X,))
    plain = regauge.optimize(graph, "prune{ratio=0.5,compensate=false}")
    kept = regauge.optimize(graph, "prune{ratio=0.5,preserve=true}")
    expected = masked(graph, plain, X)
    assert not torch.allclose(plain.run(X)[0], expected, rtol=1e-2)
    torch.testing.assert_close(kept.run(X)[0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept.to_torch()(X), expected, rtol=1e-12, atol=1e-12)
    assert "means and norms kept what they were: 2" in str(kept.report)
    assert "computed over the kept" in str(plain.report) and "computed over the kept" not in str(kept.report)


class Attending(nn.Module):
    """One head of which queries and keys, and values, may shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


def test_the_scale_of_attention_stays() -> None:
    torch.manual_seed(0)
    graph = capture(Attending().double(), (X,))
    kept = regauge.optimize(graph, "prune{ratio=0.5,preserve=true}")
    assert kept.parameters["q.weight"].shape == (4, 8)
    torch.testing.assert_close(kept.run(X)[0], masked(graph, kept, X), rtol=1e-12, atol=1e-12)


def test_what_is_refitted_is_not_preserved() -> None:
    with pytest.raises(PassError, match="preserve or compensate, not both"):
        regauge.optimize(capture(nn.Linear(8, 4).double(), (X,)), "prune{ratio=0.5,preserve=true,compensate=true}")
