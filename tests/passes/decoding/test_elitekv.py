"""EliteKV: exact at full rank, the pairs that change scores least, and caches of the latent and of what is rotated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn

import regauge
from decoders import LONGEST, Attention, Placed, Rotary, characters, decoder, of_rank, stepped
from regauge.ir.edit import remove_dead
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.states import Steps
from regauge.ir.verify import verify
from regauge.passes.attention.assembled import assembled
from regauge.passes.attention.sites import attention_sites
from regauge.passes.decoding.cache_bytes import cache_bytes
from regauge.passes.decoding.elite_pairs import best_pairs
from regauge.passes.decoding.elite_rewrite import write_elite
from regauge.passes.decoding.elite_seats import seated, seats_of
from regauge.passes.factorization.metric_svd import factored


def partly_turned(kind: str) -> nn.Module:
    """Two of four pairs do not turn, and what their channels and values are has half the rank."""
    model = Rotary(kind).double()
    for attention in model.attentions:
        attention.speeds[1:3] = 0
        still = torch.tensor([1, 2, 5, 6])
        rows = torch.cat([still, 8 + still])
        low = of_rank(torch.cat([attention.k.weight.data[rows], attention.v.weight.data]), 8)
        attention.k.weight.data[rows], attention.v.weight.data = low[:8], low[8:]
    return model


def low_together() -> nn.Module:
    """Keys and values of all heads together have half the rank."""
    model = Placed().double()
    for layer in model.qkv:
        layer.weight.data[32:] = of_rank(layer.weight.data[32:], 16)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str, float]] = {
    "whole": (lambda: Rotary("shared").double(), "kv-latent{method=elitekv,bytes=1.0,pairs=4}", 1.0),
    "shared": (lambda: partly_turned("shared"), "kv-latent{method=elitekv,bytes=0.5}", 0.5),
    "mask": (lambda: partly_turned("mask"), "kv-latent{method=elitekv,bytes=0.5}", 0.5),
    "places": (low_together, "kv-latent{method=elitekv,bytes=0.25}", 0.25),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_has_the_rank_stays_the_same(name: str) -> None:
    torch.manual_seed(0)
    make, passes, share = MODELS[name]
    graph, tokens = decoder(make()), characters(40, LONGEST)
    small = regauge.optimize(graph, passes, data=[tokens])
    verify(small, axes=True)
    (wanted,), (found,) = graph.run(tokens[:4]), small.run(tokens[:4])
    assert float((wanted - found).abs().max()) < 1e-5 * float(wanted.abs().max())  # moments are in single precision
    cached = regauge.optimize(small, "kv-cache")
    assert cache_bytes(cached) == share * cache_bytes(regauge.optimize(graph, "simplify,kv-cache"))
    torch.testing.assert_close(stepped(Steps(cached), tokens[:2, :9], (4, 1, 1, 3)), found[:2, :9])


@pytest.mark.parametrize("kind", ["shared", "mask"])
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_written_is_the_same_function(kind: str, whole: bool) -> None:
    """By the weights as they are: all pairs are rotated, or those that turn, and latents have full rank."""
    torch.manual_seed(0)
    graph, tokens = decoder(partly_turned(kind)), characters(4, LONGEST)
    changed = assembled(graph).copy()
    seats = list(seats_of(attention_sites(changed), Counter()))
    seated(changed, seats, by="test")
    for seat in seats:
        kept = torch.tensor([[0, 1, 2, 3], [3, 1, 2, 0]] if whole else [[0, 3], [3, 0]])
        key, value = (part.layer.matrix(part.layer.weight.tensor.detach()) for part in seat.site.parts[1:3])
        rows = torch.cat([key[seat.still(kept)], value[seat.site.parts[2].channels.flatten()]])
        write_elite(changed, seat, kept, *factored(rows).of_rank(min(rows.shape)), by="test")
    remove_dead(changed)
    (wanted,), (found,) = graph.run(tokens), changed.run(tokens)
    assert len(seats) == 2
    assert float((wanted - found).abs().max()) < 1e-9 * float(wanted.abs().max())


def half_in_latents() -> tuple[Graph, torch.Tensor]:
    torch.manual_seed(0)
    graph, tokens = decoder(Rotary("shared")), characters(40, LONGEST)
    passes = "kv-latent{method=elitekv,bytes=0.5,pairs=1},kv-cache"
    return regauge.optimize(graph, passes, data=[tokens]), tokens


def test_layers_make_what_is_rotated_alone() -> None:
    cached, _ = half_in_latents()
    shapes = {name: tuple(own.shape) for name, own in cached.parameters.items() if "attentions.0" in name}
    assert shapes["attentions.0.k.rotated.weight"] == (4, 32) and shapes["attentions.0.q.rotated.weight"] == (8, 32)


@pytest.mark.sweep
def test_steps_of_a_file_are_those_of_the_graph(tmp_path: Path) -> None:
    cached, tokens = half_in_latents()
    loaded = regauge.load(cached.to_onnx(tmp_path / "small.onnx"))
    wanted = stepped(Steps(cached), tokens[:2, :9], (4, 1, 4))
    torch.testing.assert_close(stepped(Steps(loaded), tokens[:2, :9], (4, 1, 4)), wanted, rtol=1e-4, atol=1e-4)


def test_pairs_are_those_that_leave_least() -> None:
    """Taken one by one they are as good as the best of all sets where changes of scores do not meet."""
    torch.manual_seed(0)
    changes = torch.randn(6, 40).double() * torch.tensor([1, 9, 3, 7, 2, 5])[:, None]
    products = (changes @ changes.T)[None]

    def left(kept: tuple[int, ...]) -> float:
        return float(changes[[own for own in range(6) if own not in kept]].sum(0).square().sum())

    kept = best_pairs(products, 3)[0].tolist()
    assert left(tuple(kept)) <= 1.5 * min(map(left, combinations(range(6), 3)))
    assert kept[0] == min(range(6), key=lambda own: left((own,)))


def test_what_is_missing_is_told() -> None:
    graph = decoder(Rotary("normed"))
    with pytest.raises(PassError, match="method=elitekv needs data"):
        regauge.optimize(graph, "kv-latent{method=elitekv}")
    small = regauge.optimize(graph, "kv-latent{method=elitekv}", data=[characters(8, LONGEST)])
    assert "normalised for each head" in str(small.report)
    linear = regauge.capture(nn.Linear(3, 2), (torch.randn(2, 3),))
    none = regauge.optimize(linear, "kv-latent{method=elitekv}", data=[torch.randn(2, 3)])
    assert "no attention is understood" in str(none.report)


class ScaledQueries(Attention):
    """Queries grow with their position, as where attention is to stay sharp on long texts."""

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        sharper = 1 + torch.arange(x.shape[-2]).float()[:, None] / 4
        return super().turned(x) * (sharper if x.shape[1] == self.heads else 1.0)


def test_scaled_queries_are_told() -> None:
    """What is not rotated any more would be read without the scale: only keys were looked at."""
    torch.manual_seed(0)
    model = Rotary("shared")
    model.attentions = nn.ModuleList(ScaledQueries(32, 4, 2, "shared") for _ in range(2))
    with pytest.raises(PassError, match="its queries are scaled besides rotating them: use method=palu"):
        regauge.optimize(decoder(model), "kv-latent{method=elitekv}", data=[characters(8, LONGEST)])
