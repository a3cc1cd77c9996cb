"""xKV: latents of adjacent layers are exact where these have the rank together, lose less than those of each layer, and
are what ``kv-cache`` keeps."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import regauge
from decoders import CHARACTERS, LONGEST, Attention, Placed, Reader, Rotary, characters, decoder, of_rank, stepped
from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.states import Steps
from regauge.ir.verify import verify
from regauge.passes.attention.assembled import assembled
from regauge.passes.attention.sites import attention_sites
from regauge.passes.decoding.cache_bytes import cache_bytes
from regauge.passes.decoding.group_chains import ChainProblem, chains_within
from regauge.passes.decoding.group_seats import groups_of, seated, write_group


class Beside(nn.Module):
    """Attentions that read the same: keys and values of the second are maps of those of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head, self.norm = nn.Embedding(CHARACTERS, 32), nn.Linear(32, CHARACTERS), nn.RMSNorm(32)
        self.attentions = nn.ModuleList(Attention(32, 4, 2, "shared") for _ in range(2))
        first, second = self.attentions
        for own, other in ((first.k, second.k), (first.v, second.v)):
            other.weight.data = torch.randn(16, 16) / 4 @ own.weight.data

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        read = self.norm(x)
        return self.head(x + sum(attention(read) for attention in self.attentions))


def halved() -> nn.Module:
    """Keys and values that have half their rank, in each layer alone."""
    model = Rotary("shared")
    for attention in model.attentions:
        for layer in (attention.k, attention.v):
            layer.weight.data = of_rank(layer.weight.data.double(), 8).float()
    return model


@pytest.mark.parametrize("make", [Beside, halved])
def test_what_has_the_rank_stays_the_same(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    graph, tokens = decoder(make().double()), characters(40, LONGEST)
    small = regauge.optimize(graph, "kv-latent{method=xkv,bytes=0.5}", data=[tokens])
    verify(small, axes=True)
    (wanted,), (found,) = graph.run(tokens[:4]), small.run(tokens[:4])
    assert float((wanted - found).abs().max()) < 1e-5 * float(wanted.abs().max())  # moments are in single precision
    assert "512 bytes -> 256 bytes of keys and values" in str(small.report)
    assert "attentions.0.k.weight to attentions.1.k.weight: keys, ranks: 32 ->" in str(small.report)
    cached = regauge.optimize(small, "kv-cache")
    assert cache_bytes(cached) == 256
    assert float((stepped(Steps(cached), tokens[:2, :9], (4, 1, 1, 3)) - found[:2, :9]).abs().max()) < 1e-10


@pytest.mark.parametrize("kind", ["shared", "normed", "places", "flat"])
def test_full_rank_is_exact(kind: str) -> None:
    torch.manual_seed(0)
    placed = kind in ("places", "flat")
    model = Placed(flat=kind == "flat") if placed else Rotary(kind)
    graph, tokens = decoder(model.double()), characters(4, LONGEST)
    changed = assembled(regauge.optimize(graph, "split-projections") if placed else graph).copy()
    groups = groups_of(attention_sites(changed), Counter(), 2)
    seated(changed, groups, by="test")
    assert [[part.kind for part in group.parts] for group in groups] == [["keys"] * 2, ["values"] * 2]
    for group in groups:
        downs, ups = [], []
        for part, layer in zip(group.parts, group.layers, strict=True):
            own = layer.matrix(layer.weight.tensor.detach())
            downs.append(torch.linalg.qr(own[:, -part.heads.layer.columns :].T)[0].T)
            ups.append(own @ torch.block_diag(*downs).T)
        write_group(changed, group, downs, ups, by="test")
    remove_dead(changed)
    verify(changed, axes=True)
    (wanted,), (found,) = graph.run(tokens), changed.run(tokens)
    assert float((wanted - found).abs().max()) < 1e-10 * float(wanted.abs().max())


MODELS = {
    "shared": lambda: Rotary("shared"),
    "fused": lambda: Rotary("fused"),
    "normed": lambda: Rotary("normed"),
    "flat": lambda: Placed(flat=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_group_loses_less_than_layers_alone_at_the_same_bytes(name: str) -> None:
    """Latents larger than the keys of one layer are among them: they are kept once, for both."""
    torch.manual_seed(0)
    graph = decoder(Reader(MODELS[name]()))
    data, held_out = characters(64, LONGEST), characters(64, LONGEST, 2)
    whole = cache_bytes(regauge.optimize(graph, "simplify,kv-cache"))

    def error(small: Graph) -> float:
        (wanted,), (found,) = graph.run(held_out), small.run(held_out)
        return float((wanted - found).square().sum() / wanted.square().sum())

    for share in (0.75, 0.25):
        alone = regauge.optimize(graph, f"kv-latent{{bytes={share},joint=true}}", data=[data])
        group = regauge.optimize(graph, f"kv-latent{{bytes={share},method=xkv}}", data=[data])
        cached = regauge.optimize(group, "kv-cache")
        assert share * whole - 4 < cache_bytes(cached) <= share * whole
        assert error(group) < 0.85 * error(alone)
        steps = stepped(Steps(cached), held_out[:2, :9], (4, 1, 1, 3))
        torch.testing.assert_close(steps, group.run(held_out[:2, :9])[0], rtol=1e-4, atol=1e-5)


def test_latents_of_groups_are_kept_in_few_bits_too() -> None:
    torch.manual_seed(0)
    graph, tokens = decoder(Reader(Rotary("shared"))), characters(64, LONGEST)
    small = regauge.optimize(graph, "kv-latent{bytes=0.5,method=xkv},kv-quantize{bits=8}", data=[tokens])
    cached = regauge.optimize(small, "kv-cache")
    assert cache_bytes(cached) < 0.2 * cache_bytes(regauge.optimize(graph, "kv-cache"))
    found = stepped(Steps(cached), tokens[:2, :9], (4, 1, 1, 3))
    torch.testing.assert_close(found, small.run(tokens[:2, :9])[0], rtol=1e-3, atol=1e-3)


def problem() -> tuple[ChainProblem, torch.Tensor]:
    """Three layers, of which each reads what that before it does and something new."""
    x = [torch.randn(400, 12).double()]
    for _ in range(2):
        x.append(x[-1] + 0.5 * torch.randn(400, 12).double())
    rows = torch.cat(x, 1)
    return ChainProblem(rows.T @ rows, [torch.randn(8, 12).double() for _ in range(3)], 4), rows


@pytest.mark.parametrize("ahead", [0.0, 0.25, 1.0])
def test_losses_are_those_of_least_squares(ahead: float) -> None:
    torch.manual_seed(0)
    given, rows = problem()
    for price in (0.0, 30.0, 300.0, 3000.0):
        chain, lost, latents = given.chain(price, ahead), 0.0, []
        for x, weight, down in zip(rows.split(12, 1), given.maps, chain.downs, strict=True):
            latents.append(x @ down.T)
            seen = torch.cat(latents, 1)
            lost += float((x @ weight.T - seen @ torch.linalg.lstsq(seen, x @ weight.T).solution).square().sum())
        assert abs(chain.loss - lost) < 1e-6 * float(rows.square().sum())
        if price == ahead == 0:
            assert lost < 1e-6


def test_later_layers_need_less_of_their_own() -> None:
    torch.manual_seed(0)
    given, _ = problem()
    alone = [ChainProblem(given.gram[i : i + 12, i : i + 12], [given.maps[i // 12]], 4) for i in (0, 12, 24)]
    for share in (0.3, 0.6, 0.9):
        (group,) = chains_within([given], share * 96, "test")
        each = chains_within(alone, share * 96, "test")
        assert given.bytes(group) <= share * 96
        assert group.loss < 0.9 * sum(own.loss for own in each)
    (whole,) = chains_within([given], 96, "test")
    assert whole.loss == 0 and whole.ranks == (8, 8, 8)


def test_what_cannot_be_is_told() -> None:
    graph = decoder(Rotary("shared"))
    with pytest.raises(PassError, match="method=xkv needs data"):
        regauge.optimize(graph, "kv-latent{method=xkv}")
    with pytest.raises(PassError, match="the smallest latents take 8 bytes"):
        regauge.optimize(graph, "kv-latent{method=xkv,bytes=0.01}", data=[characters(8, LONGEST)])
    whole = regauge.optimize(graph, "kv-latent{method=xkv,bytes=1.0}", data=[characters(8, LONGEST)])
    assert len(whole) == len(graph)
    assert "2 x keys and values fit whole" in str(whole.report)
