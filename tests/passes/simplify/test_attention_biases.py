"""Biases of keys and values: where attention drops them or passes them on, and where they stay."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.passes.simplify.catalog import RULE_SETS
from simplified import refusals, simplified

RULES = RULE_SETS["attention-biases"]


class Attention(nn.Module):
    """Grouped-query self-attention with four projections that have biases, optionally rotated keys."""

    def __init__(self, *, causal: bool = True, rotated: bool = False, normed: bool = False) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.output = nn.Linear(8, 8, bias=False)
        self.causal, self.rotated = causal, rotated
        self.norm = nn.LayerNorm(2) if normed else nn.Identity()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (p(x).view(x.shape[0], x.shape[1], -1, 2).transpose(1, 2) for p in (self.query, self.key, self.value))
        k = self.norm(k)
        if self.rotated:
            k = k * torch.cos(torch.arange(x.shape[1]))[:, None].to(k.dtype)
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and mask is None, enable_gqa=True
        )
        return self.output(y.transpose(1, 2).reshape(x.shape))


def keys(graph: Graph) -> set[str]:
    return set(graph.to_torch().state_dict())


def test_biases_of_keys_and_values_go_into_the_output() -> None:
    for causal in (True, False):
        graph = simplified(Attention(causal=causal), torch.randn(2, 5, 8))
        assert keys(graph) == {
            "query.weight", "query.bias", "key.weight", "value.weight", "output.weight", "output.bias"
        }  # fmt: skip


@pytest.mark.parametrize("options", [{"rotated": True}, {"normed": True}])
def test_a_bias_of_keys_stays_before_a_rotation_or_a_norm(options: dict[str, Any]) -> None:
    graph = simplified(Attention(**options), torch.randn(2, 5, 8))
    assert "key.bias" in keys(graph) and "value.bias" not in keys(graph)


def test_the_bias_of_values_stays_under_a_mask_that_is_an_input() -> None:
    """A row of the mask may be closed as a whole, and is in the example."""
    mask = torch.tril(torch.ones(5, 5)) > 0
    mask[2] = False
    graph = simplified(Attention(), torch.randn(2, 5, 8), mask)
    assert "value.bias" in keys(graph) and "key.bias" not in keys(graph)


def masked(mask: torch.Tensor | None, **attributes: Any) -> Graph:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (1, 3, 4), torch.float64)
    w, b, o = (build.parameter(n, torch.randn(s).double()) for n, s in (("w", (4, 4)), ("b", (4,)), ("o", (4, 4))))
    split = build.permute(build.reshape(x, shape=(1, 3, 2, 2)), dims=(0, 2, 1, 3))
    value = build.permute(build.reshape(build.linear(x, w, b), shape=(1, 3, 2, 2)), dims=(0, 2, 1, 3))
    given = None if mask is None else build.constant(mask)
    y = build.attention(split, split, value, given, scale=0.5, **attributes)
    graph.outputs = [build.linear(build.reshape(build.permute(y, dims=(0, 2, 1, 3)), shape=(1, 3, 4)), o)]
    return graph


CLOSED = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
MINUS = torch.zeros(3, 3).double().masked_fill(~CLOSED, -math.inf)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (masked(CLOSED), "its mask leaves nothing of some rows"),
        (masked(MINUS), "its mask leaves nothing of some rows"),
        (masked(None, dropout_p=0.1), "dropout of attention weights"),
    ],
)
def test_rows_that_have_no_sum_of_one_stay(graph: Graph, reason: str) -> None:
    assert reason in refusals(graph, RULES)


def test_heads_that_are_laid_along_positions_stay() -> None:
    graph = Graph()
    build = Builder(graph)
    x = build.input("x", (1, 3, 4), torch.float64)
    w, b = build.parameter("w", torch.randn(4, 4).double()), build.parameter("b", torch.randn(4).double())
    key = build.permute(build.permute(build.linear(x, w, b), dims=(0, 2, 1)), dims=(0, 1, 2))
    q = build.input("q", (1, 4, 3), torch.float64)
    graph.outputs = [build.attention(q, key, q, scale=0.5)]
    assert "laid along the axis of positions" in refusals(graph, RULES)
