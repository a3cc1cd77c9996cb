"""Keys projected behind their rotation, and latents in an order of which every start is a good cache."""

from __future__ import annotations

import pytest
import torch

import regauge
from decoders import LONGEST, Placed, Reader, Rotary, characters, decoder, of_rank, stepped
from regauge.ir.graph import Graph
from regauge.ir.states import Steps
from regauge.ir.verify import verify
from regauge.passes.decoding.cache_bytes import cache_bytes


def error(graph: Graph, small: Graph, tokens: torch.Tensor) -> float:
    (wanted,), (found,) = graph.run(tokens), small.run(tokens)
    return float((wanted - found).square().sum() / wanted.square().sum())


def in_few_directions(kind: str) -> torch.nn.Module:
    """Keys of each head lie in two of four pairs, and so do rotated ones; values have half the rank."""
    model = Rotary(kind).double()
    for attention in model.attentions:
        attention.k.weight.data.view(2, 2, 4, -1)[:, :, 2:] = 0
        attention.v.weight.data.copy_(of_rank(attention.v.weight.data.view(2, 8, -1), 4).flatten(0, 1))
    return model


@pytest.mark.parametrize("kind", ["shared", "mask", "normed"])
def test_rotated_keys_of_few_directions_stay_the_same(kind: str) -> None:
    """Nothing is computed anew for past positions: attention reads what is kept."""
    torch.manual_seed(0)
    graph, tokens = decoder(in_few_directions(kind)), characters(40, LONGEST)
    small = regauge.optimize(graph, "kv-latent{method=matryoshka,bytes=0.5}", data=[tokens])
    verify(small, axes=True)
    (wanted,), (found,) = graph.run(tokens[:4]), small.run(tokens[:4])
    assert float((wanted - found).abs().max()) < 1e-5 * float(wanted.abs().max())  # moments are in single precision
    cached = regauge.optimize(small, "kv-cache")
    assert cache_bytes(cached) == 512 / 2
    torch.testing.assert_close(stepped(Steps(cached), tokens[:2, :9], (4, 1, 1, 3)), found[:2, :9])


@pytest.mark.parametrize("kind", ["rotary", "places"])
def test_every_start_of_the_latents_is_a_good_cache(kind: str) -> None:
    """Of one set of weights, with all directions, the first half is near what is fitted for half; the last is not."""
    torch.manual_seed(0)
    graph = decoder(Reader(Rotary("shared") if kind == "rotary" else Placed()))
    data, tokens = [characters(64, LONGEST, seed) for seed in (0, 1)], characters(32, LONGEST, 2)
    whole = regauge.optimize(graph, "kv-latent{method=matryoshka,bytes=1.0}", data=data)
    assert error(graph, whole, tokens) < 1e-9
    names = {group.dim.name for group in whole.groups() if ("latent_" in group.name or "turned_" in group.name)
             and group.free and int(group.dim.size) == 8}  # fmt: skip
    assert len(names) == 4
    half = regauge.resize(whole, dict.fromkeys(names, range(4)))
    last = regauge.resize(whole, dict.fromkeys(names, range(4, 8)))
    fitted = regauge.optimize(graph, "kv-latent{method=matryoshka,bytes=0.5}", data=data)
    errors = [error(graph, small, tokens) for small in (fitted, half, last)]
    assert errors[1] < 10 * errors[0] + 1e-6 and errors[1] < 0.2 * errors[2]  # outputs are not fitted to the start
    cached = [regauge.optimize(small, "kv-cache") for small in (whole, half)]
    assert cache_bytes(cached[1]) == cache_bytes(cached[0]) / 2
    torch.testing.assert_close(stepped(Steps(cached[1]), tokens[:2, :9], (4, 1, 4)), half.run(tokens[:2, :9])[0],
                               rtol=1e-4, atol=1e-4)  # fmt: skip
