"""``kv-quantize`` in blocks of positions: the same step by step however they are cut, and ranges over positions."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import regauge
from decoders import Placed, Rotary, characters, decoder, stepped, with_uneven_channels
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.states import Steps
from regauge.ir.verify import verify
from regauge.passes.decoding.cache_bytes import cache_bytes

CUTS = [(19,), (3, 1, 1, 1, 2, 1, 1, 9), (1,) * 19]
SIZES = {  # two attentions; of keys and of values 4 heads of 8 channels, or 2
    ("places", "kivi", 4): 2 * 4 * ((4 + 8 * 4 / 4) + (4 + 4)),
    ("shared", "kivi", 2): 2 * 2 * ((2 + 8 * 4 / 4) + (2 + 4)),
    # keys: outliers of 8 channels, values: of 4 positions; [4, 2] and [2, 8] numbers of the map
    ("shared", "gear", 2): 2 * 2 * ((2 + 8) + (8 * 6 + 48) / 4 + (2 + 4) + (4 * 6 + 48) / 4),
}


@cache
def graph(kind: str) -> Graph:
    torch.manual_seed(0)
    return decoder(Placed() if kind == "places" else Rotary(kind))


@cache
def rounded(kind: str, method: str, bits: int) -> Graph:
    return regauge.optimize(graph(kind), f"kv-quantize{{method={method},bits={bits},block=4}}")


@pytest.mark.parametrize(("kind", "method", "bits"), SIZES)
def test_steps_give_what_the_whole_gives(kind: str, method: str, bits: int) -> None:
    whole = rounded(kind, method, bits)
    cached = regauge.optimize(whole, "kv-cache")
    verify(cached, axes=True)
    assert cache_bytes(cached) == pytest.approx(SIZES[kind, method, bits])
    tokens = characters(2, 19)
    (wanted,) = whole.run(tokens)
    for cuts in CUTS:
        torch.testing.assert_close(stepped(Steps(cached), tokens, cuts), wanted, rtol=1e-3, atol=1e-4)
    assert "of positions whose block is not full" in str(whole.report)


def error(whole: Graph, found: Graph) -> float:
    tokens = characters(16, 20, 5)
    (wanted,), (got,) = whole.run(tokens), found.run(tokens)
    return float((wanted - got).square().sum() / wanted.square().sum()) ** 0.5


def test_the_block_that_is_not_full_is_as_it_was() -> None:
    tokens = characters(2, 3)
    assert torch.equal(graph("shared").run(tokens)[0], rounded("shared", "kivi", 2).run(tokens)[0])
    tokens = characters(2, 9)
    assert not torch.equal(graph("shared").run(tokens)[0], rounded("shared", "kivi", 2).run(tokens)[0])


def test_ranges_over_positions_fit_channels_that_differ() -> None:
    torch.manual_seed(0)
    model = with_uneven_channels(Rotary("shared"))
    whole = decoder(model)
    lost = [
        error(whole, regauge.optimize(whole, f"kv-quantize{{bits=2{more}}}")) for more in ("", ",method=kivi,block=4")
    ]
    assert lost[1] < 0.5 * lost[0]


def test_maps_and_outliers_make_up_for_few_bits() -> None:
    assert error(graph("shared"), rounded("shared", "gear", 2)) < 0.5 * error(
        graph("shared"), rounded("shared", "kivi", 2)
    )


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(PassError, match="method=kivi goes without"):
        regauge.optimize(graph("shared"), "kv-quantize{method=kivi,predict=true}")
    masked = regauge.optimize(graph("mask"), "kv-quantize{method=kivi}")
    assert "an attention that is not causal, or has a mask" in str(masked.report)


class WrittenOut(nn.Module):
    """Causal attention as products and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.keys = nn.Embedding(40, 8), nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (x @ self.keys(x).transpose(-1, -2)).masked_fill(~seen, float("-inf"))
        found: torch.Tensor = scores.softmax(-1) @ x
        return found


def test_attention_of_several_nodes_is_told() -> None:
    whole = regauge.capture(WrittenOut().eval(), (torch.ones(2, 9, dtype=torch.long),), dynamic={0: {0: "b", 1: "l"}})
    assert "attention that is several nodes" in str(regauge.optimize(whole, "kv-quantize{method=kivi}").report)
