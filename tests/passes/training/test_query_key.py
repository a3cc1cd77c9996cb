"""Products of query and key weights: the same function, whatever lies between the layers and attention."""

from collections import Counter

import pytest
import torch
from torch import nn

import regauge
from regauge.training import Qat, query_key_products


class Fused(nn.Module):
    """Self-attention from one layer, laid out as vision transformers do, or by chunks."""

    def __init__(self, *, chunks: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.chunks = nn.Linear(12, 36), nn.Linear(12, 12), chunks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        if self.chunks:
            q, k, v = (part.view(n, length, 3, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        else:
            q, k, v = self.qkv(x).reshape(n, length, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.chunks)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class Cross(nn.Module):
    """Queries from one input and keys from another of another width, without biases; or queries that are normalised."""

    def __init__(self, *, normalised: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 8, bias=False), nn.Linear(10, 8), nn.Linear(10, 6)
        self.norm = nn.LayerNorm(4) if normalised else nn.Identity()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2)
            for t in (self.norm(self.q(x).unflatten(-1, (2, 4))).flatten(2), self.k(y), self.v(y))
        )
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("chunks", [True, False], ids=["chunks", "unbind"])
def test_one_layer_for_all(chunks: bool) -> None:
    """Wq' Wk is 12 x 12 in each of 3 heads; values get a layer of their own. Trained, it is emitted as it is."""
    torch.manual_seed(0)
    graph = regauge.capture(Fused(chunks=chunks), (torch.randn(2, 5, 12),), dynamic={0: {0: "batch", 1: "length"}})
    found = query_key_products(graph)
    x = torch.randn(3, 7, 12)
    torch.testing.assert_close(found.run(x)[0], graph.run(x)[0], rtol=1e-4, atol=1e-5)
    assert found.find("qkv.weight_query_key").shape == (36, 12) and found.find("qkv.weight_value").shape == (12, 12)
    assert "qkv.weight" not in found.parameters
    weight = graph.parameters["qkv.weight"].tensor.detach()
    torch.testing.assert_close(
        found.find("qkv.weight_query_key").tensor[12:24], (weight[4:8].T @ weight[16:20]).T, rtol=1e-4, atol=1e-6
    )
    qat = Qat(found, "w2", scales="statistics", target="reference")
    assert torch.equal(qat.finish().run(x)[0], qat.module(x))


def test_queries_from_elsewhere() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 5, 12), torch.randn(2, 3, 10)
    graph = regauge.capture(Cross(), inputs)
    found = query_key_products(graph)
    torch.testing.assert_close(found.run(inputs)[0], graph.run(inputs)[0], rtol=1e-4, atol=1e-5)
    assert found.find("q.weight_query_key").shape == (20, 12) and "k.weight" not in found.parameters


def test_what_is_no_layout_stays() -> None:
    inputs = torch.randn(2, 5, 12), torch.randn(2, 3, 10)
    left: Counter[str] = Counter()
    found = query_key_products(regauge.capture(Cross(normalised=True), inputs), left)
    assert left == {"queries or keys are not rows of a linear layer": 1} and "k.weight" in found.parameters
