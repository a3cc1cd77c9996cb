"""Dims whose masked indices would be felt are pinned; where zeros arrive, they stay free."""

import torch
import torch.nn.functional as F
from torch import nn

import regauge
from cutting import cut_all


class _LinearAttention(nn.Module):
    """Attention without softmax: ``phi`` makes features of queries and keys."""

    def __init__(self, phi: nn.Module) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.phi = phi

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.phi(self.k(x)).transpose(1, 2)
        result: torch.Tensor = self.o(self.phi(self.q(x)) @ (features @ self.v(x)))
        return result


class _EluPlusOne(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.elu(x) + 1


def group(model: nn.Module, member: str, shape: tuple[int, ...] = (2, 6, 8)) -> regauge.ir.dims.groups.Group:
    graph = regauge.capture(model.eval(), (torch.randn(*shape),))
    (found,) = [g for g in graph.groups() if any(str(m) == member for m in g.members)]
    return found


def test_features_that_are_one_where_weights_are_zero_are_kept() -> None:
    found = group(_LinearAttention(_EluPlusOne()), "q.weight:0")
    assert not found.free and "= add makes other numbers of zeros" in str(found.pins[0])


def test_features_that_are_zero_where_weights_are_zero_are_cut() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    graph = regauge.capture(_LinearAttention(nn.ReLU()).double().eval(), (x,))
    assert {g.members[0].parameter.name: g.size for g in graph.groups() if g.free} == {"q.weight": 12, "v.weight": 12}
    cut_all(graph, [x])


class _MeanOf(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.activation(self.a(x))
        return result.sum(-1)


def test_a_sum_over_what_an_activation_makes_of_zeros() -> None:
    assert not group(_MeanOf(nn.Sigmoid()), "a.weight:0").free
    assert not group(_MeanOf(nn.LogSoftmax(-1)), "a.weight:0").free
    assert group(_MeanOf(nn.SiLU()), "a.weight:0").free
    assert group(_MeanOf(nn.Hardtanh(-1.0, 6.0)), "a.weight:0").free
    assert not group(_MeanOf(nn.Hardtanh(0.5, 6.0)), "a.weight:0").free


class _AveragedHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        result: tuple[torch.Tensor, torch.Tensor] = self.attention(x, x, x, need_weights=True)
        return result


def test_heads_whose_attention_is_averaged_are_kept() -> None:
    """A head without weights attends to everything evenly, and its share of the average remains."""
    graph = regauge.capture(_AveragedHeads().eval(), (torch.randn(2, 6, 8),))
    sizes = {
        int(g.size): g.free for g in graph.groups() if any(str(m) == "attention.out_proj.weight:1" for m in g.members)
    }
    assert sizes == {4: False, 2: True}


class _GroupTokens(nn.Module):
    """Learned tokens that a linear layer mixes among each other and a softmax then compares (as in GroupViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 4, 8))
        self.mix = nn.Linear(4, 4)
        self.key = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.key(self.mix(self.tokens.transpose(1, 2)).transpose(1, 2))
        assigned = torch.softmax(tokens @ x.transpose(1, 2), 1)
        return assigned.transpose(1, 2) @ tokens


def test_tokens_that_weights_mix_and_a_softmax_compares_are_kept() -> None:
    found = group(_GroupTokens(), "mix.weight:0")
    assert not found.free and "softmax" in found.pins[0].where


class _GainlessNorm(nn.Module):
    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.a, self.before, self.norm = nn.Linear(8, 16), before, nn.LayerNorm(16, elementwise_affine=False)
        self.b = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.b(self.norm(self.before(self.a(x))))
        return result


def test_a_norm_without_gain_wants_zeros() -> None:
    assert group(_GainlessNorm(nn.Tanh()), "a.weight:0").free
    assert not group(_GainlessNorm(nn.Softplus()), "a.weight:0").free
