"""Decoders of transformers that take and give keys and values themselves, exported by torch and as ONNX files."""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regauge
from decoders import characters, stepped
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.states import Steps, carried
from regauge.passes.decoding.cache_bytes import cache_bytes


@pytest.fixture(autouse=True, scope="module")
def transformers_loads() -> None:
    """Here and not above: it takes seconds, and would take them of every run that only collects."""
    pytest.importorskip("transformers")
    sys.path.append(str(Path(__file__).resolve().parents[4] / "shared" / "tools"))
    with contextlib.suppress(ImportError):  # transformers imports torchvision where it is installed, beside any torch
        import torchvision_on_cpu  # noqa: F401
    try:
        from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401
    except (ImportError, RuntimeError) as reason:
        pytest.skip(f"transformers does not load here: {reason}")


PLACES = {"vocab_size": 23, "bos_token_id": 0, "eos_token_id": 0}
KINDS = ["llama", "gpt2"]
HEADS = {"llama": 2, "gpt2": 4}  # of keys and values, 8 channels each, in two layers
Past = list[tuple[torch.Tensor, torch.Tensor]]


def model(kind: str) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**PLACES, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**PLACES, **sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


class WithPast(nn.Module):
    """The cache of a model as tensors: keys and values of each layer, handed in and given back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None, past: Past) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(list(past))
        found = self.inner(tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
        return found.logits, [(layer.keys, layer.values) for layer in found.past_key_values.layers]


class WithoutPast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(tokens, use_cache=False).logits
        return logits


def past_of(kind: str) -> Past:
    return [(torch.zeros(2, HEADS[kind], 3, 8), torch.zeros(2, HEADS[kind], 3, 8)) for _ in range(2)]


@functools.cache
def captured(kind: str) -> Graph:
    dynamic = {
        "tokens": {0: "batch", 1: "length"},
        "past": [({0: "batch", 2: "past"}, {0: "batch", 2: "past"})] * 2,
    }
    return regauge.capture(WithPast(model(kind)), (characters(2, 5), None, past_of(kind)), dynamic=dynamic)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_a_captured_model_become_states(kind: str) -> None:
    found = regauge.optimize(captured(kind), "kv-cache")
    assert "its own caches were found" in str(found.report)
    assert [state.name for state in carried(found)] == ["past.0.0", "past.0.1", "past.1.0", "past.1.1"]
    assert cache_bytes(found) == 2 * 2 * HEADS[kind] * 8 * 4
    tokens = characters(2, 9)
    wanted = model(kind)(tokens).logits
    torch.testing.assert_close(stepped(Steps(found), tokens, (4, 1, 1, 3)), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.sweep
def test_files_in_the_layout_of_optimum_keep_their_names(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    kind = "gpt2"
    path, total = tmp_path / f"{kind}.onnx", "past_sequence_length + sequence_length"
    places = [f"{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", *(f"past_key_values.{place}" for place in places)]
    batch, length, past = map(torch.export.Dim, ("batch_size", "sequence_length", "past_sequence_length"))
    torch.onnx.export(
        WithPast(model(kind)),
        (characters(2, 5), torch.ones(2, 8, dtype=torch.int64), past_of(kind)),
        path,
        input_names=names,
        output_names=["logits", *(f"present.{place}" for place in places)],
        dynamic_shapes={
            "tokens": {0: batch, 1: length},
            "mask": {0: batch, 1: torch.export.Dim.DYNAMIC},
            "past": [({0: batch, 2: past}, {0: batch, 2: past})] * 2,
        },
        dynamo=True,
        verbose=False,
    )
    loaded = regauge.load(renamed(path, total))
    found = regauge.optimize(loaded, "kv-cache")
    assert [state.name for state in carried(found)] == names[2:]
    assert cache_bytes(found) == 2 * 2 * HEADS[kind] * 8 * 4
    tokens, steps = characters(2, 9), Steps(found)
    chunks = list(zip(tokens.split([4, 1, 4], 1), (4, 5, 9), strict=True))
    results = [steps(part, torch.ones(2, count, dtype=torch.int64))[0] for part, count in chunks]
    torch.testing.assert_close(torch.cat(results, 1), model(kind)(tokens).logits, rtol=1e-4, atol=1e-6)
    again = regauge.load(found.to_onnx(tmp_path / "again.onnx"))
    assert [value.name for value in again.inputs] == names
    assert [value.name for value in again.outputs] == ["logits", *(f"present.{place}" for place in places)]


def renamed(path: Path, total: str) -> Path:
    """The length of the mask called as optimum calls it, by the sum of the others."""
    import onnx

    file = onnx.load(path)
    mask = next(entry for entry in file.graph.input if entry.name == "attention_mask")
    mask.type.tensor_type.shape.dim[1].dim_param = total
    onnx.save(file, path)
    return path


def test_what_makes_caches_smaller_says_how() -> None:
    for name in ("kv-latent", "kv-quantize"):
        with pytest.raises(
            PassError, match=rf"{name}: the graph has caches of its own, such as past\.0\.0: .*use_cache"
        ):
            regauge.optimize(captured("llama"), name)


def test_without_its_own_caches_a_model_gets_small_ones() -> None:
    kind = "llama"
    tokens = characters(2, 9)
    graph = regauge.capture(WithoutPast(model(kind)), (tokens,), dynamic={0: {0: "batch", 1: ("length", 1, 64)}})
    small = regauge.optimize(graph, "kv-latent{bytes=0.5}")
    assert cache_bytes(regauge.optimize(small, "kv-cache")) == 2 * HEADS[kind] * 8 * 4
    cached = regauge.optimize(graph, "kv-quantize{bits=8},kv-cache")
    assert cache_bytes(cached) == 2 * 2 * HEADS[kind] * (8 + 4)
    wanted = model(kind)(tokens).logits
    torch.testing.assert_close(stepped(Steps(cached), tokens, (4, 1, 4)), wanted, rtol=0.05, atol=1e-3)
