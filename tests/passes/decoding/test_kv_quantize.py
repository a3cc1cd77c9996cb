"""``kv-quantize``: what caches hold are codes and ranges, and what is computed from them is the same step by step."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import regauge
from decoders import Placed, Rotary, characters, decoder, stepped, with_uneven_channels
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.states import Steps, carried
from regauge.ir.verify import verify
from regauge.passes.decoding.cache_bytes import cache_bytes
from regauge.passes.decoding.quantized_cache import balanced


@cache
def graph(kind: str) -> Graph:
    torch.manual_seed(0)
    return decoder(Placed() if kind == "places" else Rotary(kind))


def error(kind: str, passes: str, data: list[torch.Tensor] | None = None) -> float:
    found = regauge.optimize(graph(kind), passes, data=data)
    tokens = characters(16, 20, 5)
    (wanted,), (got,) = graph(kind).run(tokens), found.run(tokens)
    return float((wanted - got).square().sum() / wanted.square().sum()) ** 0.5


@pytest.mark.parametrize(("bits", "most"), [(8, 0.002), (4, 0.04), (2, 0.2)])
def test_more_bits_lose_less(bits: int, most: float) -> None:
    lost = error("places", f"kv-quantize{{bits={bits}}}")
    assert most / 20 < lost < most


def test_statistics_of_channels_help_where_they_differ() -> None:
    torch.manual_seed(0)
    model = with_uneven_channels(Rotary("shared"))
    whole, tokens = decoder(model), characters(16, 20, 5)
    losses = []
    for data in (None, [characters(32, 20)]):
        found = regauge.optimize(whole, "kv-quantize{bits=4}", data=data)
        losses.append(float((whole.run(tokens)[0] - found.run(tokens)[0]).square().mean()))
    assert losses[1] < 0.5 * losses[0]


def test_balance_is_between_ranges_and_what_errors_change() -> None:
    found = balanced(torch.zeros(2), torch.tensor([1.0, 4.0]), torch.tensor([1.0, 1.0]))
    assert float(found.share[1] / found.share[0]) == pytest.approx(2)
    found = balanced(torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 4.0]))
    assert float(found.share[1] / found.share[0]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "passes", "size"),
    [
        ("places", "kv-quantize{bits=4}", 2 * 2 * 4 * (4 + 4)),
        ("places", "kv-quantize{bits=2,group=4}", 2 * 2 * 4 * (2 + 8)),
        ("shared", "kv-quantize{bits=8}", 2 * 2 * 2 * (8 + 4)),
    ],
)
def test_caches_hold_codes_and_ranges(kind: str, passes: str, size: int) -> None:
    cached = regauge.optimize(graph(kind), f"{passes},kv-cache")
    verify(cached, axes=True)
    assert cache_bytes(cached) == size
    assert {state.before.dtype for state in carried(cached)} == {torch.uint8, torch.float16}
    rounded, tokens = regauge.optimize(graph(kind), passes), characters(2, 9)
    found = stepped(Steps(cached), tokens, (4, 1, 1, 3))
    torch.testing.assert_close(found, rounded.run(tokens)[0], rtol=1e-3, atol=1e-4)
    assert f"-> {size} bytes of caches" in str(rounded.report)


def test_latents_are_rounded_in_the_place_of_rotated_keys() -> None:
    small = regauge.optimize(graph("shared"), "kv-latent{bytes=0.5},kv-quantize{bits=8},kv-cache")
    latent = [state.before for state in carried(small) if state.before.dtype == torch.uint8]
    assert sum(int(value.shape[-1]) * (2 if value.rank == 4 else 1) for value in latent) == 32


def test_what_cannot_be_rounded_is_told() -> None:
    with pytest.raises(PassError, match="run it in front of kv-cache"):
        regauge.optimize(graph("places"), "kv-cache,kv-quantize")
    alone = regauge.optimize(graph("places"), "kv-quantize{group=3}")
    assert "4 x 3 channels do not divide 8" in str(alone.report)
