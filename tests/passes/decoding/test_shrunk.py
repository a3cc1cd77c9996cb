"""``kv-quantize{method=cskv}``: older positions as latents of few channels, the same step by step."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import regauge
from decoders import Placed, Rotary, characters, decoder, stepped
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.states import Steps
from regauge.ir.verify import verify
from regauge.passes.decoding.cache_bytes import cache_bytes

CUTS = [(19,), (3, 1, 1, 1, 2, 1, 1, 9), (1,) * 19]
SIZES = {  # two attentions, of keys and of values 32 channels of 4 heads, or 16 of 2; half of them are kept
    ("places", "bits=16"): 2 * 2 * 16 * 2,
    ("shared", "bits=16"): 2 * 2 * 8 * 2,
    ("shared", "bits=4"): 2 * 2 * 8 * (1 / 2 + 4 / 4),  # and of each latent and block of 4 a range
}


@cache
def graph(kind: str) -> Graph:
    torch.manual_seed(0)
    return decoder(Placed() if kind == "places" else Rotary(kind))


@cache
def shrunk(kind: str, options: str) -> Graph:
    return regauge.optimize(graph(kind), f"kv-quantize{{method=cskv,block=4,{options}}}", data=[characters(32, 20)])


def error(whole: Graph, found: Graph) -> float:
    tokens = characters(16, 20, 5)
    (wanted,), (got,) = whole.run(tokens), found.run(tokens)
    return float((wanted - got).square().sum() / wanted.square().sum()) ** 0.5


@pytest.mark.parametrize(("kind", "options"), SIZES)
def test_steps_give_what_the_whole_gives(kind: str, options: str) -> None:
    whole = shrunk(kind, options)
    cached = regauge.optimize(whole, "kv-cache")
    verify(cached, axes=True)
    assert cache_bytes(cached) == SIZES[kind, options]
    tokens = characters(2, 19)
    (wanted,) = whole.run(tokens)
    for cuts in CUTS:
        torch.testing.assert_close(stepped(Steps(cached), tokens, cuts), wanted, rtol=1e-3, atol=1e-4)


def test_the_block_that_is_not_full_is_as_it_was() -> None:
    tokens = characters(2, 3)
    assert torch.equal(graph("shared").run(tokens)[0], shrunk("shared", "bits=16").run(tokens)[0])
    assert not torch.equal(
        graph("shared").run(characters(2, 9))[0], shrunk("shared", "bits=16").run(characters(2, 9))[0]
    )


def test_ranks_go_where_channels_count_within_the_bytes() -> None:
    torch.manual_seed(0)
    model = Placed()
    model.out[1].weight.data.mul_(1e-3)  # nearly nothing comes of the second attention
    whole, data = decoder(model), [characters(32, 20)]
    even = regauge.optimize(whole, "kv-quantize{method=cskv,block=4,bits=16}", data=data)  # 128 bytes
    chosen = regauge.optimize(whole, "kv-quantize{method=cskv,block=4,bits=16,bytes=128}", data=data)
    assert cache_bytes(regauge.optimize(chosen, "kv-cache")) <= 128
    assert error(whole, chosen) < 0.2 * error(whole, even)


def test_keys_that_are_rotated_are_shrunk_before() -> None:
    torch.manual_seed(0)
    model = Rotary("shared")
    for attention in model.attentions:  # of rank 4 as their layers make them, of far more once they are rotated
        for layer in (attention.k, attention.v):
            layer.weight.data.copy_(torch.randn(16, 4) @ torch.randn(4, 32) / 8)
    whole = decoder(model)
    found = regauge.optimize(whole, "kv-quantize{method=cskv,block=4,bits=16,bytes=32}", data=[characters(32, 20)])
    cached = regauge.optimize(found, "kv-cache")
    assert cache_bytes(cached) == 32  # rank 4 of each of four; 256 as they are
    assert error(whole, found) < 1e-3
    tokens = characters(2, 19)
    torch.testing.assert_close(stepped(Steps(cached), tokens, CUTS[1]), found.run(tokens)[0], rtol=1e-3, atol=1e-4)


def test_what_lies_in_few_directions_of_all_heads_takes_no_more() -> None:
    torch.manual_seed(0)
    model = Placed()
    for layer in model.qkv:  # keys and values of rank 4 in all heads together, and means far off
        for rows in (slice(32, 64), slice(64, 96)):
            layer.weight.data[rows] = torch.randn(32, 4) @ torch.randn(4, 32) / 16
            layer.bias.data[rows] = torch.randn(32)
    whole = decoder(model)
    found = regauge.optimize(
        whole, "kv-quantize{method=cskv,block=4,bits=16,bytes=32}", data=[characters(32, 20)]
    )  # 512 as they are: rank 4 of each of four
    assert cache_bytes(regauge.optimize(found, "kv-cache")) == 32
    assert error(whole, found) < 1e-3


def test_latents_of_fewer_bits_lose_less_than_codes_of_all_channels() -> None:
    kivi = regauge.optimize(graph("places"), "kv-quantize{method=kivi,block=4,bits=2}")
    own = shrunk("places", "bytes=0.2")
    sizes = [cache_bytes(regauge.optimize(found, "kv-cache")) for found in (own, kivi)]
    assert sizes[0] < 0.8 * sizes[1]
    assert error(graph("places"), own) < 0.5 * error(graph("places"), kivi)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(PassError, match="shrinks channels as data shows them: give batches"):
        regauge.optimize(graph("shared"), "kv-quantize{method=cskv}")
    with pytest.raises(PassError, match="bits=16 is for method=cskv"):
        regauge.optimize(graph("shared"), "kv-quantize{bits=16}")
    with pytest.raises(PassError, match="bits=1 is for method=coupled"):
        regauge.optimize(graph("shared"), "kv-quantize{method=cskv,bits=1}")
    with pytest.raises(PassError, match="method=cskv goes without group"):
        regauge.optimize(graph("shared"), "kv-quantize{method=cskv,group=4}")
    with pytest.raises(PassError, match="4 bytes cannot be met: latents of rank 1 take 8"):
        regauge.optimize(graph("shared"), "kv-quantize{method=cskv,bits=16,bytes=4}", data=[characters(32, 20)])
