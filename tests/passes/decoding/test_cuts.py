"""What a cache keeps: of all values that keys and values can be computed from those that take least room together."""

from __future__ import annotations

import cProfile
import pstats

import torch
import torch.nn.functional as F
from torch import nn

import regauge
from decoders import CHARACTERS, Attention, Rotary, decoder
from regauge.ir.graph import Graph
from regauge.ir.states import carried
from regauge.passes.decoding.cache_bytes import cache_bytes


class Latents(nn.Module):
    """Keys and values of one latent, that is ``rank`` wide, as one product or as two side by side (``parts``)."""

    def __init__(self, rank: int, parts: int = 1) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(CHARACTERS, 32), nn.Linear(32, CHARACTERS)
        self.q, self.k, self.v, self.o = (nn.Linear(n, 32, bias=False) for n in (32, rank, rank, 32))
        self.downs = nn.ModuleList(nn.Linear(32, rank // parts, bias=False) for _ in range(parts))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        latent = torch.cat([down(x) for down in self.downs], -1)
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (self.q(x), self.k(latent), self.v(latent)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.o(mixed.transpose(1, 2).flatten(2)))


def test_what_serves_keys_and_values_is_paid_for_once() -> None:
    """A latent larger than the keys, but smaller than keys and values, cannot be told from either alone."""
    for rank in (16, 28):
        cached = regauge.optimize(decoder(Latents(rank, parts=2)), "kv-cache")
        assert cache_bytes(cached) == 4 * rank


def test_a_latent_as_large_as_what_it_is_made_of_is_none() -> None:
    """Neither is one whose parts are smaller, but not together; then keys and values are kept."""
    for rank, parts in ((32, 1), (32, 2), (48, 2)):
        cached = regauge.optimize(decoder(Latents(rank, parts)), "kv-cache")
        assert cache_bytes(cached) == 4 * 64


class Signals(nn.Module):
    """A decoder over signals: a linear layer makes what its blocks read, and adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(40, 32), nn.Linear(32, 3)
        self.attentions = nn.ModuleList(Attention(32, 4, 4, "shared") for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for attention in self.attentions:
            x = x + attention(x)
        return self.head(x)


def test_a_sum_of_many_layers_is_no_latent() -> None:
    """What the second block reads is as wide as each of its addends: its keys and values are kept, not it."""
    graph = regauge.capture(Signals().eval(), (torch.randn(2, 5, 40),), dynamic={0: {0: "batch", 1: ("length", 1, 24)}})
    found = carried(regauge.optimize(graph, "kv-cache"))
    assert [tuple(state.before.shape[1::2]) for state in found if "attentions.1" in state.name] == [(4, 8)] * 2


class Deep(Rotary):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Attention(32, 4, 2, "shared") for _ in range(blocks))
        self.norms = nn.ModuleList(nn.RMSNorm(32) for _ in range(2 * blocks + 1))
        self.ups = nn.ModuleList(nn.Linear(32, 64) for _ in range(blocks))
        self.downs = nn.ModuleList(nn.Linear(64, 32) for _ in range(blocks))

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        x = self.table(characters)
        for block, attention in enumerate(self.attentions):
            x = x + attention(self.norms[2 * block](x))
            x = x + self.downs[block](F.silu(self.ups[block](self.norms[2 * block + 1](x))))
        return self.head(self.norms[-1](x))


def calls(graph: Graph) -> int:
    profile = cProfile.Profile()
    profile.enable()
    regauge.optimize(graph, "kv-cache")
    profile.disable()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def test_the_work_grows_with_the_number_of_layers() -> None:
    """Twice as many layers are at most twice the work: where the residual stream leads is found once."""
    regauge.optimize(decoder(Deep(1)), "kv-cache")
    assert calls(decoder(Deep(8))) < 2.05 * calls(decoder(Deep(4)))
