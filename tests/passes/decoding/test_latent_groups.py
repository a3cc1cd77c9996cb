"""Latents of groups of adjacent heads (``kv-latent{group=2}``): between those of each head and one of all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
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
    "shared": lambda: Rotary("shared", 32, 8, 4),  # rotated; eight heads of queries for four of keys and values
    "mask": lambda: Rotary("mask", 32, 8, 4),
}


def of_groups(model: nn.Module) -> nn.Module:
    """With keys and values whose two groups of two heads have half their rank each; all heads together have no less."""
    model = model.double()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (name.startswith("qkv") or name.endswith((".k", ".v"))):
            fused = name.startswith("qkv")
            parts = layer.weight.data.view(3 if fused else 1, 2, -1, layer.in_features)
            for part in parts[1:] if fused else parts:
                part.copy_(of_rank(part, part.shape[1] // 2))
    return model


@pytest.mark.parametrize(
    ("name", "with_data"), [("places", False), ("flat", True), ("shared", False), ("shared", True), ("mask", False)]
)
def test_what_has_the_rank_in_groups_stays_the_same(name: str, with_data: bool) -> None:
    torch.manual_seed(0)
    check_latents_of_half(decoder(of_groups(MODELS[name]())), "kv-latent{joint=true,group=2}", with_data=with_data)


def test_maps_of_groups_are_one_batched_product_without_zeros() -> None:
    torch.manual_seed(0)
    graph = decoder(Rotary("shared", 32, 8, 4))
    small = regauge.optimize(graph, "kv-latent{joint=true,group=2}")
    for name in ("k", "v"):
        shapes = [tuple(small.parameters[f"attentions.0.{name}.{own}.weight"].shape) for own in ("latent", "heads")]
        assert shapes == [(8, 32), (2, 4, 8)]  # two groups of rank 4, of two heads of 4 channels each
    assert "256 bytes -> 128 bytes of keys and values" in str(small.report)
    for later in ("simplify", "unfactorize{when=always}"):
        found = regauge.optimize(small, later)
        assert cache_bytes(regauge.optimize(found, "kv-cache")) == 128, later


def error(graph: Graph, text: str, data: torch.Tensor, held_out: torch.Tensor) -> float:
    small = regauge.optimize(graph, text, data=[data])
    assert cache_bytes(regauge.optimize(small, "kv-cache")) <= cache_bytes(regauge.optimize(graph, "kv-cache")) / 2
    (wanted,), (found,) = graph.run(held_out), small.run(held_out)
    return float((wanted - found).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("name", ["places", "shared"])
def test_groups_lose_less_than_heads_and_more_than_all(name: str) -> None:
    torch.manual_seed(0)
    graph = decoder(Reader(MODELS[name]()))
    data, held_out = characters(64, LONGEST), characters(64, LONGEST, 2)
    ways = ("joint=false", "joint=true,group=1", "joint=true,group=2", "joint=true,group=4", "joint=true", "group=2")
    alone, one, two, four, every, chosen = (
        error(graph, f"kv-latent{{bytes=0.5,{way}}}", data, held_out) for way in ways
    )
    assert every == four < 0.9 * two and two < 0.9 * min(alone, one)
    assert chosen < 1.02 * two  # of latents of each head and of groups those that lose less


class Interleaved(nn.Module):
    """Channels of heads lie between each other: the first of each head, then the second of each."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CHARACTERS, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, CHARACTERS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        q, k, v = (layer(x).unflatten(-1, (4, 4)).permute(0, 3, 1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.permute(0, 2, 3, 1).flatten(2))


def test_channels_go_back_to_the_places_that_the_layer_has_for_them() -> None:
    torch.manual_seed(0)
    model = Interleaved().double()
    for layer in (model.k, model.v):
        groups = layer.weight.data.view(4, 2, 2, 16).permute(1, 2, 0, 3)  # [group, head, channel, inputs]
        low = of_rank(groups.reshape(2, 8, 16), 4).view(2, 2, 4, 16)
        layer.weight.data.copy_(low.permute(2, 0, 1, 3).reshape(16, 16))
    graph, tokens = decoder(model), characters(4, LONGEST)
    small = regauge.optimize(graph, "kv-latent{joint=true,group=2}")
    assert "k.weight: keys, rank: 8 -> 4" in str(small.report)
    torch.testing.assert_close(small.run(tokens)[0], graph.run(tokens)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.sweep
def test_maps_of_groups_run_in_onnxruntime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cached = regauge.optimize(decoder(Rotary("shared", 32, 8, 4)), "kv-latent{joint=true,group=2},kv-cache")
    cached.to_onnx(tmp_path / "small.onnx")
    tokens, run = characters(2, 5), onnxruntime.InferenceSession(tmp_path / "small.onnx")
    given = {value.name: np.zeros([2, *(own if isinstance(own, int) else 0 for own in value.shape[1:])], np.float32)
             for value in cached.inputs[1:]}  # fmt: skip
    logits = run.run(None, {cached.inputs[0].name: tokens.numpy(), **given})[0]
    torch.testing.assert_close(torch.from_numpy(logits), stepped(Steps(cached), tokens, (5,)), rtol=1e-4, atol=1e-4)


def test_groups_that_heads_have_not_are_refused() -> None:
    graph = decoder(Rotary("shared", 32, 8, 4))
    with pytest.raises(PassError, match=r"attentions.0.k.weight makes keys of 4 heads.* give group=1 or 2 or 4"):
        regauge.optimize(graph, "kv-latent{group=3}")
    with pytest.raises(PassError, match="group=2 is of joint latents"):
        regauge.optimize(graph, "kv-latent{group=2,joint=false}")
    with pytest.raises(PassError, match="not method=xkv"):
        regauge.optimize(graph, "kv-latent{group=2,method=xkv}")
