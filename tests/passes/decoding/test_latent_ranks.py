"""Ranks of heads one by one: chosen as a search over all of them does, and written without a zero."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import regauge
from decoders import LONGEST, Placed, Rotary, characters, decoder, of_rank, stepped
from regauge.ir.graph import Graph
from regauge.ir.states import Steps, carried
from regauge.ir.verify import verify
from regauge.passes.decoding.cache_bytes import cache_bytes
from regauge.passes.decoding.latent_ranks import best_ranks

RANKS = (2, 6, 2, 6)


@pytest.mark.parametrize("widths", [1, 2, 3])
def test_no_other_ranks_of_the_same_number_lose_less(widths: int) -> None:
    """All ranks of four heads of five, as far as they have so few widths."""
    energies = np.sort(np.random.default_rng(0).exponential(1, (4, 5)) ** 3, axis=1)[:, ::-1]
    lost = np.concatenate([energies[:, ::-1].cumsum(1)[:, ::-1], np.zeros((4, 1))], axis=1)
    least: dict[int, float] = {}
    for ranks in itertools.product(range(1, 6), repeat=4):
        if len(set(ranks)) <= widths:
            loss = float(lost[range(4), ranks].sum())
            least[sum(ranks)] = min(loss, least.get(sum(ranks), np.inf))
    found = best_ranks(lost, widths)
    assert len({sum(ranks) for ranks in found}) > 4
    for ranks in found:
        assert len(set(ranks)) <= widths
        assert float(lost[range(4), ranks].sum()) <= least[sum(ranks)] * (1 + 1e-9)


def uneven(model: nn.Module, heads: int) -> nn.Module:
    """With keys and values of heads of other ranks, one by one."""
    model = model.double()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (name.startswith("qkv") or name.endswith(".v")):
            many = 3 if name.startswith("qkv") else 1
            parts = layer.weight.data.view(many, heads, 8, -1)
            for part, head in itertools.product(range(many // 2, many), range(heads)):
                parts[part, head] = of_rank(parts[part, head], RANKS[head])
    return model


MODELS = {
    "heads": (lambda: uneven(Placed(), 4), "kv-latent{bytes=0.5,joint=false,widths=2}"),
    "shared values": (lambda: uneven(Rotary("shared"), 2), "kv-latent{bytes=0.75,joint=false,widths=2}"),
    "values of a mask": (lambda: uneven(Rotary("mask"), 2), "kv-latent{bytes=0.75,joint=false,widths=2}"),
}


def small_and_whole(name: str) -> tuple[Graph, Graph]:
    torch.manual_seed(0)
    make, passes = MODELS[name]
    graph = decoder(make())
    return graph, regauge.optimize(graph, passes)


@pytest.mark.parametrize("name", MODELS)
def test_heads_of_their_own_ranks_stay_the_same(name: str) -> None:
    """Their caches have no more numbers than the ranks add up to, and give what the whole graph does."""
    graph, small = small_and_whole(name)
    verify(small, axes=True)
    tokens = characters(4, LONGEST)
    (wanted,), (found,) = graph.run(tokens), small.run(tokens)
    assert float((wanted - found).abs().max()) < 1e-9 * float(wanted.abs().max())
    assert "values, ranks: 8 -> 2 6" in str(small.report)
    assert sum(node.op == "attention" for node in small.nodes) == 4  # two for each of two
    cached = regauge.optimize(small, "kv-cache")
    share = 0.5 if name == "heads" else 0.75
    assert cache_bytes(cached) == share * cache_bytes(regauge.optimize(graph, "simplify,kv-cache"))
    torch.testing.assert_close(stepped(Steps(cached), tokens[:2, :9], (4, 1, 1, 3)), found[:2, :9])


def test_one_rank_for_all_heads_is_worse() -> None:
    graph, _ = small_and_whole("heads")
    even = regauge.optimize(graph, "kv-latent{bytes=0.5,joint=false}")
    tokens = characters(4, LONGEST)
    assert float((even.run(tokens)[0] - graph.run(tokens)[0]).abs().max()) > 1e-3


@pytest.mark.sweep
def test_heads_of_their_own_ranks_run_in_onnxruntime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = decoder(uneven(Placed(), 4).float())
    cached = regauge.optimize(graph, "kv-latent{bytes=0.5,joint=false,widths=2},kv-cache")
    assert len(carried(cached)) == 8
    cached.to_onnx(tmp_path / "small.onnx")
    tokens, run = characters(2, 5), onnxruntime.InferenceSession(tmp_path / "small.onnx")
    given = {value.name: np.zeros([2, *map(int, value.shape[1:2]), 0, int(value.shape[-1])], np.float32)
             for value in cached.inputs[1:]}  # fmt: skip
    logits = run.run(None, {cached.inputs[0].name: tokens.numpy(), **given})[0]
    torch.testing.assert_close(torch.from_numpy(logits), graph.run(tokens)[0], rtol=1e-4, atol=1e-4)
