"""``kv-latent``: exact where keys and values have the rank, better on data, and kept as latents by ``kv-cache``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regauge
from decoders import (
    CHARACTERS,
    LONGEST,
    Placed,
    Reader,
    Rotary,
    characters,
    check_latents_of_half,
    decoder,
    of_rank,
    stepped,
)
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.states import Steps
from regauge.passes.decoding.cache_bytes import cache_bytes

MODELS = {
    "places": Placed,
    "flat": lambda: Placed(flat=True),
    "shared": lambda: Rotary("shared"),
    "mask": lambda: Rotary("mask"),
    "fused": lambda: Rotary("fused"),  # one layer for queries, rotated keys and values
    "normed": lambda: Rotary("normed"),  # keys are normalised before they are rotated
}


def halved(model: nn.Module) -> nn.Module:
    """With keys and values of heads of half their rank; rotated keys of all heads together."""
    model = model.double()
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        weight = layer.weight.data
        if name.startswith("qkv"):
            parts = weight.view(3, 4, 8, -1)
            weight.copy_(torch.stack([parts[0], of_rank(parts[1], 4), of_rank(parts[2], 4)]).view_as(weight))
        elif name.endswith(".qkv"):
            _, k, v = weight.split([32, 16, 16])
            k.copy_(of_rank(k, 8))
            v.copy_(of_rank(v.view(2, 8, -1), 4).view_as(v))
        elif name.endswith(".v"):
            weight.copy_(of_rank(weight.view(2, 8, -1), 4).view_as(weight))
        elif name.endswith(".k"):
            weight.copy_(of_rank(weight, 8))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_data", [False, True])
def test_what_has_the_rank_stays_the_same(name: str, with_data: bool) -> None:
    torch.manual_seed(0)
    check_latents_of_half(decoder(halved(MODELS[name]())), "kv-latent{bytes=0.5}", with_data=with_data)


def error(graph: Graph, small: Graph, tokens: torch.Tensor) -> float:
    (wanted,), (found,) = graph.run(tokens), small.run(tokens)
    return float((wanted - found).square().sum() / wanted.square().sum())


def test_data_tells_what_matters() -> None:
    torch.manual_seed(0)
    graph = decoder(Reader(Placed()))
    data, held_out = [characters(64, LONGEST, seed) for seed in (0, 1)], characters(64, LONGEST, 2)
    plain = regauge.optimize(graph, "kv-latent{bytes=0.5}")
    fitted = regauge.optimize(graph, "kv-latent{bytes=0.5}", data=data)
    assert error(graph, fitted, held_out) < 0.3 * error(graph, plain, held_out)
    assert "512 bytes -> 256 bytes of keys and values" in str(fitted.report)


def test_of_joint_latents_and_those_of_heads_the_pass_takes_what_loses_less() -> None:
    torch.manual_seed(0)
    graph, tokens = decoder(Rotary("shared")), characters(64, LONGEST)
    alone, joint, chosen = (
        regauge.optimize(graph, f"kv-latent{{bytes=0.5{way}}}", data=[tokens])
        for way in (",joint=false", ",joint=true", "")
    )
    assert error(graph, joint, tokens) < error(graph, alone, tokens)
    assert error(graph, chosen, tokens) <= error(graph, joint, tokens) * (1 + 1e-6)
    assert cache_bytes(regauge.optimize(chosen, "kv-cache")) <= cache_bytes(regauge.optimize(graph, "kv-cache")) / 2


def test_joint_latents_are_kept_where_layers_read_sequences_and_positions_as_one_axis() -> None:
    """The report said so; of the cache they took as much as keys and values did."""
    torch.manual_seed(0)
    graph, tokens = decoder(Placed(flat=True)), characters(64, LONGEST)
    small = regauge.optimize(graph, "kv-latent{bytes=0.5,joint=true}", data=[tokens])
    assert "512 bytes -> 256 bytes of keys and values" in str(small.report)
    cached = regauge.optimize(small, "kv-cache")
    assert cache_bytes(cached) == 256
    torch.testing.assert_close(stepped(Steps(cached), tokens[:2, :9], (4, 1, 1, 3)), small.run(tokens[:2, :9])[0])


@pytest.mark.parametrize("with_data", [False, True])
def test_attention_reads_latents_itself_where_that_loses_nothing(with_data: bool) -> None:
    torch.manual_seed(0)
    graph = decoder(halved(Rotary("shared")))
    small = regauge.optimize(graph, "kv-latent{bytes=0.5}", data=[characters(40, LONGEST)] if with_data else None)
    names = set(small.parameters)
    for block in (0, 1):
        assert {f"attentions.{block}.v.latent_values.weight", f"attentions.{block}.k.latent.weight"} <= names


@pytest.mark.parametrize("name", ["places", "shared"])
@pytest.mark.parametrize("text", ["kv-latent{bytes=0.5}", "kv-latent{bytes=0.75,joint=true}"])
def test_later_passes_leave_latents_as_narrow_as_they_are(name: str, text: str) -> None:
    """The product of the two maps may have fewer parameters: they were multiplied, and the cache was whole again."""
    torch.manual_seed(0)
    graph, tokens = decoder(MODELS[name]()), characters(40, LONGEST)
    small = regauge.optimize(graph, text, data=[tokens])
    kept = cache_bytes(regauge.optimize(small, "kv-cache"))
    assert kept <= cache_bytes(regauge.optimize(graph, "kv-cache")) * (0.75 if "0.75" in text else 0.5)
    for later in ("simplify", "unfactorize{when=always}", "kv-cache,simplify"):
        found = regauge.optimize(small, later)
        assert cache_bytes(found if "cache" in later else regauge.optimize(found, "kv-cache")) == kept, later
    simple = regauge.optimize(small, "simplify").run(tokens[:4])[0]
    torch.testing.assert_close(simple, small.run(tokens[:4])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["kv-latent{bytes=0.5}", "kv-latent{bytes=0.5,joint=true}"])
@pytest.mark.parametrize("name", ["places", "shared"])
def test_the_report_of_a_second_pass_counts_the_latents_of_the_first(name: str, text: str) -> None:
    """It counted whole heads again, and made latents of latents that were larger."""
    torch.manual_seed(0)
    small = regauge.optimize(decoder(MODELS[name]()), text)
    again = regauge.optimize(small, text.replace("0.5", "0.7"))
    smaller = regauge.optimize(small, text.replace("0.5", "0.4"))
    joint = "joint" in text
    if joint or name == "shared":  # rotated keys come from a layer behind their latent
        assert "it comes from a latent already" in str(again.report)
    now, after = (cache_bytes(regauge.optimize(graph, "kv-cache")) for graph in (small, smaller))
    assert cache_bytes(regauge.optimize(again, "kv-cache")) <= now
    if joint:
        assert len(again) == len(small)
        assert f"{now:.0f} bytes -> {after:.0f} bytes of keys and values" in str(smaller.report)


def test_budgets_are_refused_where_they_cannot_be_met() -> None:
    graph = decoder(Placed())
    with pytest.raises(PassError, match="the smallest latents take 16 bytes"):
        regauge.optimize(graph, "kv-latent{bytes=0.01}")
    with pytest.raises(PassError, match="run it in front of kv-cache"):
        regauge.optimize(graph, "kv-cache,kv-latent")
    whole = regauge.optimize(graph, "kv-latent{bytes=1.0}")
    assert len(whole) == len(graph)
    assert "4 x keys and values fit whole" in str(whole.report)


def test_what_cannot_be_smaller_is_told() -> None:
    class Fused(nn.Module):
        """Keys that are normalised, out of a projection that makes values, too, and parts that overlap."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.qkv, self.out = nn.Embedding(CHARACTERS, 8), nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            made = self.qkv(self.table(tokens))
            q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in made.chunk(3, -1))
            k = nn.functional.rms_norm(k, (4,))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(mixed.transpose(1, 2).flatten(2)) * made[..., :5].sum(-1, keepdim=True)

    small = regauge.optimize(decoder(Fused()), "kv-latent{bytes=0.5}")
    assert "1 x keys: their layer makes something else, too" in str(small.report)
    assert "values, rank: 4 -> 2" in str(small.report)


def test_a_fused_projection_loses_no_more_than_three_layers() -> None:
    """Rotated keys of one layer with queries and values are made latents as those of a layer of their own."""
    torch.manual_seed(0)
    fused, apart = Rotary("fused"), Rotary("shared")
    state = fused.state_dict()
    for name in [name for name in state if name.endswith("qkv.weight")]:
        for part, rows in zip("qkv", state.pop(name).split([32, 16, 16]), strict=True):
            state[name.replace("qkv", part)] = rows
    apart.load_state_dict(state)
    tokens = characters(4, LONGEST)
    small, wanted = (regauge.optimize(decoder(model), "kv-latent{bytes=0.5}") for model in (fused, apart))
    torch.testing.assert_close(small.run(tokens)[0], wanted.run(tokens)[0], rtol=1e-4, atol=1e-4)
    shapes = [sorted(tuple(p.shape) for p in graph.parameters.values()) for graph in (small, wanted)]
    assert shapes[0] == shapes[1]


class PartlyRotated(nn.Module):
    """One layer makes queries, keys and values; half of each query and key is scaled by its position and norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv, self.out = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 20)
        self.gain = nn.Parameter(torch.rand(4) + 0.5)

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain
        angles = torch.arange(x.shape[-2])[:, None] / 7.0
        (a, b), rest = x[..., :2].chunk(2, -1), x[..., 2:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], -1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(self.table(tokens)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_values_are_latents_beside_keys_that_are_not_understood() -> None:
    tokens = torch.randint(0, 20, (3, 7))
    graph = regauge.capture(PartlyRotated().eval(), (tokens,), dynamic={0: {0: "batch", 1: "length"}})
    small = regauge.optimize(graph, "kv-latent{bytes=0.75}")
    assert "values, rank" in str(small.report)
    torch.testing.assert_close(small.to_torch()(tokens), small.run(tokens)[0], rtol=1e-4, atol=1e-5)
