"""``kv-cache``: at every step what the whole sequence gives, however it is cut, in torch and in onnxruntime too."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import regauge
from decoders import CHARACTERS, LONGEST, Placed, Rotary, characters, decoder, stepped
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.states import Steps, carried
from regauge.ir.verify import verify
from regauge.passes.decoding.cache_bytes import cache_bytes

MODELS = {
    "places": Placed,
    "shared": lambda: Rotary("shared"),
    "mask": lambda: Rotary("mask"),
    "products": lambda: Rotary("products"),
}


@pytest.fixture(scope="module")
def graphs() -> dict[str, tuple[Graph, Graph]]:
    torch.manual_seed(0)
    whole = {name: decoder(make()) for name, make in MODELS.items()}
    return {name: (graph, regauge.optimize(graph, "kv-cache")) for name, graph in whole.items()}


@settings(max_examples=4, deadline=None)
@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=5).filter(lambda c: sum(c) <= LONGEST),
    seed=st.integers(0, 9),
)
@pytest.mark.parametrize("name", MODELS)
def test_every_step_is_that_of_the_whole(
    graphs: dict[str, tuple[Graph, Graph]], name: str, counts: list[int], seed: int
) -> None:
    whole, cached = graphs[name]
    tokens = characters(3, sum(counts), seed)
    torch.testing.assert_close(stepped(Steps(cached), tokens, counts), whole.run(tokens)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_values_are_kept_before_heads_are_repeated(graphs: dict[str, tuple[Graph, Graph]], name: str) -> None:
    _, cached = graphs[name]
    verify(cached, axes=True)
    heads = 4 if name == "places" else 2
    assert len(carried(cached)) == 4
    assert all(state.before.shape[1:] == (heads, state.before.shape[2], 8) for state in carried(cached))
    assert cache_bytes(cached) == 2 * 2 * heads * 8 * 4
    assert f"{cache_bytes(cached):.0f} bytes for each position" in str(cached.report)


@pytest.mark.sweep
def test_files_get_caches_in_front_of_heads_that_are_folded_into_the_batch(
    graphs: dict[str, tuple[Graph, Graph]], tmp_path: Path
) -> None:
    whole, cached = graphs["shared"]
    loaded = regauge.load(whole.to_onnx(tmp_path / "whole.onnx"))
    found = regauge.optimize(loaded, "kv-cache")
    assert cache_bytes(found) == cache_bytes(cached)
    tokens = characters(2, 9)
    torch.testing.assert_close(stepped(Steps(found), tokens, (4, 1, 4)), whole.run(tokens)[0], rtol=1e-4, atol=1e-5)
    found.to_onnx(tmp_path / "cached.onnx")


def test_states_stand_behind_inputs_and_outputs_under_their_modules(graphs: dict[str, tuple[Graph, Graph]]) -> None:
    _, cached = graphs["shared"]
    names = [f"attentions.{i}.{part}" for i in (0, 1) for part in ("keys", "values")]
    assert [value.name for value in cached.inputs] == ["characters", *names]
    assert [output.name for output in cached.outputs][1:] == [f"{name}.next" for name in names]


@pytest.mark.parametrize("name", [pytest.param("places", marks=pytest.mark.sweep), "shared"])
def test_modules_and_files_take_and_give_the_states(
    graphs: dict[str, tuple[Graph, Graph]], name: str, tmp_path: Path
) -> None:
    import onnxruntime

    whole, cached = graphs[name]
    tokens, counts = characters(2, 9), (4, 1, 1, 3)
    wanted = whole.run(tokens)[0]
    module = cached.to_torch()
    torch.testing.assert_close(stepped(Steps(cached, module), tokens, counts), wanted, rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession(cached.to_onnx(tmp_path / "cached.onnx"))
    names = [entry.name for entry in session.get_inputs()]

    def run(*given: torch.Tensor) -> list[torch.Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, feeds)]

    torch.testing.assert_close(stepped(Steps(cached, run), tokens, counts), wanted, rtol=1e-4, atol=1e-4)
    loaded = regauge.load(tmp_path / "cached.onnx")
    of_others = onnx.load(tmp_path / "cached.onnx")  # which do not say what their states are
    del of_others.metadata_props[:]
    found = regauge.optimize(regauge.load(of_others), "kv-cache")
    assert "its own caches were found" in str(found.report)
    for graph in (loaded, found):
        assert cache_bytes(graph) == cache_bytes(cached)
        torch.testing.assert_close(stepped(Steps(graph), tokens, counts), wanted, rtol=1e-4, atol=1e-4)


class WithCache(nn.Module):
    """A layer that takes and gives keys and values itself, the keys of a cache that starts from an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.kv, self.empty = nn.Embedding(CHARACTERS, 8), nn.Linear(8, 16), nn.Buffer(torch.zeros(2, 0, 8))

    def forward(self, tokens: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.table(tokens)
        k, v = self.kv(x).chunk(2, -1)
        keys, values = torch.cat([torch.cat([self.empty, keys], 1), k], 1), torch.cat([values, v], 1)
        places = torch.arange(keys.shape[1])
        mask = places[-tokens.shape[1] :, None] >= places
        return nn.functional.scaled_dot_product_attention(x, keys, values, mask), keys, values


def test_caches_that_a_module_has_are_found() -> None:
    past = torch.zeros(2, 3, 8)
    dynamic = {0: {1: "length"}, 1: {1: "past"}, 2: {1: "past"}}
    graph = regauge.capture(WithCache().eval(), (characters(2, 5), past, past), dynamic=dynamic)
    found = regauge.optimize(graph, "kv-cache")
    assert [state.name for state in carried(found)] == ["keys", "values"]
    assert cache_bytes(found) == 2 * 2 * 8 * 4
    tokens = characters(2, 7)
    whole, steps = Steps(found)(tokens)[0], Steps(found)
    torch.testing.assert_close(stepped(steps, tokens, (3, 1, 3)), whole)


class Tokens(nn.Module):
    """What an encoder does: every position sees all others."""

    def __init__(self, mix: str) -> None:
        super().__init__()
        self.table, self.q, self.mix = nn.Embedding(CHARACTERS, 8), nn.Linear(8, 8), mix

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        if self.mix == "sum":
            x = x.cumsum(1)
        return torch.nn.functional.scaled_dot_product_attention(self.q(x), x, x, is_causal=self.mix != "all")


def test_passes_behind_it_take_the_data_of_the_whole_graph(graphs: dict[str, tuple[Graph, Graph]]) -> None:
    whole, cached = graphs["shared"]
    data = [(characters(4, 12, seed), torch.zeros(4)) for seed in (1, 2)]  # with labels
    tokens, counts = characters(2, 9), (4, 1, 4)
    found, wanted = (regauge.optimize(graph, "quantize{scheme=w8a8}", data=data) for graph in (cached, whole))
    results, exact = stepped(Steps(found), tokens, counts), whole.run(tokens)[0]
    assert (results - exact).norm() < 1.1 * (wanted.run(tokens)[0] - exact).norm() < 0.05 * exact.norm()
    named = regauge.optimize(cached, "quantize{scheme=w8a8}", data=[{"characters": batch[0]} for batch in data])
    torch.testing.assert_close(stepped(Steps(named), tokens, counts), results)


def test_what_is_not_causal_is_refused() -> None:
    with pytest.raises(PassError, match="not causal"):
        regauge.optimize(decoder(Tokens("all")), "kv-cache")
    for name in ("kv-cache", "kv-quantize"):
        with pytest.raises(PassError, match=rf"^{name}: cumsum.* mixes positions"):
            regauge.optimize(decoder(Tokens("sum")), name)


def test_an_axis_that_nothing_mixes_needs_no_cache() -> None:
    graph = decoder(Tokens("none"))
    for name in ("kv-cache", "kv-quantize"):
        found = regauge.optimize(graph, f"{name}{{axis=batch}}")
        assert not carried(found) and len(found) == len(graph)
        assert "there is nothing to keep" in str(found.report)


def test_graphs_without_a_dynamic_axis_of_positions_are_refused() -> None:
    graph = regauge.capture(Placed().eval(), (characters(2, 5),), dynamic={0: {0: "batch"}})
    with pytest.raises(PassError, match="capture the model with its axis of positions dynamic"):
        regauge.optimize(graph, "kv-cache")


def test_a_graph_with_states_is_left_alone(graphs: dict[str, tuple[Graph, Graph]]) -> None:
    _, cached = graphs["shared"]
    again = regauge.optimize(cached, "kv-cache")
    assert len(carried(again)) == 4
    assert "it has states already" in str(again.report)
