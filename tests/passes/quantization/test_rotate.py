"""``rotate``: the same function, streams and heads in a basis without outliers, and less error in few bits."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from layered_networks import Decoder, GroupedDecoder, encoder, ids, redrawn
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.quantization.hadamard import rotation, signs_of, two_factors
from rounded_networks import in_few_bits, relative


class Wide(nn.Module):
    """Two blocks of attention and of a gated hidden layer behind norms, 64 channels wide, on ids of 50 kinds."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.table, self.last, self.head = nn.Embedding(50, 64), norm(64), nn.Linear(64, 50, bias=False)
        self.norms = nn.ModuleList(norm(64) for _ in range(4))
        self.q, self.k, self.v, self.o = (nn.ModuleList(nn.Linear(64, 64) for _ in range(2)) for _ in range(4))
        self.gate, self.up = (nn.ModuleList(nn.Linear(64, 96) for _ in range(2)) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(96, 64) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for n in range(2):
            y = self.norms[2 * n](x)
            heads = (part[n](y).unflatten(-1, (4, 16)).transpose(1, 2) for part in (self.q, self.k, self.v))
            mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.o[n](mixed.transpose(1, 2).flatten(2))
            y = self.norms[2 * n + 1](x)
            x = x + self.down[n](nn.functional.silu(self.gate[n](y)) * self.up[n](y))
        return self.head(self.last(x))


def with_outliers(norm: type[nn.Module]) -> tuple[Graph, Any]:
    """Two channels of the stream ten times as large as others, two of norms twenty times and read as much less."""
    torch.manual_seed(0)
    model = Wide(norm)
    tokens = torch.randint(0, 50, (4, 12))
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = p.dim() == 1 and ("norm" in name or "last" in name)
            p.copy_(torch.rand_like(p) + 0.5 if gain else torch.randn_like(p) / p.shape[-1] ** 0.5)
            if gain and name.endswith("weight"):
                p[[3, 9]] *= 20
            if p.dim() == 2 and name.split(".")[0] in ("q", "k", "v", "gate", "up", "head"):
                p[:, [3, 9]] /= 20
        model.table.weight *= 8
        model.table.weight[:, [5, 20]] *= 10
    return regauge.capture(model.eval(), (tokens,)), (tokens,)


def decoder(kind: type[nn.Module]) -> tuple[Graph, Any]:
    example = ids() if isinstance(ids(), tuple) else (ids(),)
    return regauge.capture(redrawn(kind(2)), example), example


@pytest.mark.parametrize(
    ("kind", "options"),
    list(itertools.product([Decoder, GroupedDecoder], ["", "{online=[inputs,queries]}", "{kind=random,seed=3}"])),
)
def test_decoders_stay_the_same(kind: type[nn.Module], options: str) -> None:
    """Layer norms or RMS norms, heads that share keys and values, position codes or none: the stream and all heads."""
    graph, example = decoder(kind)
    found = regauge.optimize(graph, f"rotate{options}")
    assert relative(graph, found, example) < 2e-5
    assert [node.op for node in found.nodes].count("layer_norm") == 0
    assert not any(node.op == "rms_norm" and len(node.inputs) > 1 for node in found.nodes)
    moved = {name for name, p in found.parameters.items() if name in graph.parameters and p.rank > 1
             and not torch.equal(p.tensor, graph.parameters[name].tensor)}  # fmt: skip
    assert len(moved) >= sum(p.rank > 1 and p.kind == "parameter" for p in graph.parameters.values()) - 1


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_outliers_cost_less_then(norm: type[nn.Module]) -> None:
    """Weights of 4 and of 8 bits, what layers read of 8 with one scale: 15 to 19, 22 to 37 dB; 11 to 16, 17 to 35."""
    graph, example = with_outliers(norm)
    plain, turned, online = (
        regauge.optimize(graph, name) for name in ("simplify", "rotate", "rotate{online=[inputs]}")
    )
    assert relative(graph, turned, example) < 2e-5 and relative(graph, online, example) < 2e-5
    four, eight = ([in_few_bits(found, example, bits) for found in (plain, turned, online)] for bits in (4, 8))
    assert four[1] > four[0] + 3 and eight[1] > eight[0] + 10 and eight[2] > eight[1] + 0.5


def test_learned_rotations_lose_less_than_those_they_start_at() -> None:
    graph, example = with_outliers(nn.RMSNorm)
    start, found = (
        regauge.optimize(graph, name, data=[example]) for name in ("rotate", "rotate{kind=learned,steps=30}")
    )
    assert relative(graph, found, example) < 2e-5
    before, after = (in_few_bits(g, example, 4) for g in (start, found))
    assert after > before + 0.2


def test_models_of_transformers_stay_the_same() -> None:
    """A Llama, and a GPT-2, whose head is its table: the head becomes a weight of its own, with the last gain."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    try:
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=32, **sizes,
        ))  # fmt: skip
        gpt = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_positions=16, n_embd=16, n_layer=2, n_head=2, **sizes)
        )
    except ModuleNotFoundError as reason:
        pytest.skip(f"transformers cannot be used here: {reason}")
    for model in (llama, gpt):
        tokens = torch.randint(0, 30, (2, 6))
        graph = regauge.capture(redrawn(model), (tokens,))
        found = regauge.optimize(graph, "rotate")
        assert relative(graph, found, (tokens,)) < 2e-5
        if model is gpt:
            table, head = (found.parameters[name].tensor for name in ("transformer.wte.weight", "lm_head.weight"))
            assert not torch.equal(table, head)


def test_streams_that_others_than_norms_read_keep_their_layer_norms() -> None:
    """Norms behind the sums give the stream: nothing of it can be rotated, heads can."""
    x = torch.randn(2, 5, 16)
    graph = regauge.capture(encoder(2), (x,))
    found = regauge.optimize(graph, "rotate")
    assert relative(graph, found, (x,)) < 1e-5
    assert [node.op for node in found.nodes].count("layer_norm") == 4


class Picked(nn.Module):
    """A stream of which one layer reads the norm as it is, and another some rows of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("rows", torch.tensor([3, 0, 2]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.table(tokens))
        return torch.cat([self.a(y).tanh().flatten(1), self.b(y[:, self.rows]).flatten(1)], 1)


class Merged(nn.Module):
    """Pairs of neighbours are laid end to end behind a norm, and normalised together, as Swin merges patches."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.inner = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.merged, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + self.inner(self.norm(x))
        return self.head(self.merged(torch.cat([x[:, ::2], x[:, 1::2]], -1)))


def test_a_norm_over_several_pieces_keeps_their_mean() -> None:
    tokens = torch.randint(0, 20, (2, 6))
    graph = regauge.capture(redrawn(Merged()), (tokens,))
    found = regauge.optimize(graph, "rotate")
    assert relative(graph, found, (tokens,)) < 1e-5
    assert "layer_norm" in [node.op for node in found.nodes]


class Similar(nn.Module):
    """Rows of the stream are compared with one another, mean and all."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        return self.head(self.norm(x)).mean(-1) + (x @ x.transpose(1, 2)).tanh().mean(-1)


def test_a_stream_whose_values_are_compared_keeps_its_mean() -> None:
    tokens = torch.randint(0, 20, (2, 6))
    graph = regauge.capture(redrawn(Similar()), (tokens,))
    found = regauge.optimize(graph, "rotate")
    assert relative(graph, found, (tokens,)) < 1e-5
    assert [node.op for node in found.nodes].count("layer_norm") == 1


def test_gains_go_through_whatever_stands_before_a_layer() -> None:
    """A negative gain and a lookup of rows; where a gain is zero, it stays and so does the stream."""
    tokens = torch.randint(0, 20, (2, 5))
    model = redrawn(Picked())
    with torch.no_grad():
        model.norm.weight[4] = -2.0
    for rotations in (1, 0):
        graph = regauge.capture(model, (tokens,))
        found = regauge.optimize(graph, "rotate")
        assert relative(graph, found, (tokens,)) < 1e-5
        assert any("table.weight:1" in note for note in found.report.passes[0].notes) is bool(rotations)
        with torch.no_grad():
            model.norm.weight[4] = 0.0


def test_an_onnx_file_stays_the_same(tmp_path: Any) -> None:
    graph, example = decoder(GroupedDecoder)
    loaded = regauge.load(graph.to_onnx(tmp_path / "a.onnx"))
    found = regauge.optimize(loaded, "rotate")
    again = regauge.load(found.to_onnx(tmp_path / "b.onnx"))
    assert relative(graph, again, example) < 2e-5 and "Dims rotated" in found.report.passes[0].notes[0]


def test_hadamard_matrices_of_many_orders() -> None:
    orders = [order for order in range(1, 130) if signs_of(order) is not None]
    assert [o for o in orders if o < 65] == [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64]
    for order in orders:
        signs = signs_of(order)
        assert signs is not None and np.array_equal(signs @ signs.T, order * np.eye(order))
    generator = torch.Generator().manual_seed(0)
    for size in (7, 24, 86):
        matrix = rotation("hadamard", size, generator)
        assert float((matrix @ matrix.T - torch.eye(size)).abs().max()) < 1e-12
    assert two_factors(768) == (24, 32) and two_factors(7) == (1, 7) and two_factors(11008) == (86, 128)


def test_options_that_do_nothing_are_refused() -> None:
    graph, _ = decoder(Decoder)
    with pytest.raises(PassError, match="bits does nothing with kind=hadamard"):
        regauge.optimize(graph, "rotate{bits=3}")
    with pytest.raises(PassError, match="needs data for kind=learned"):
        regauge.optimize(graph, "rotate{kind=learned}")
