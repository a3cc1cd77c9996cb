"""Which parts of a network can be skipped: branches, blocks, what they are called, and what is left alone."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from layered_networks import Decoder, GroupedDecoder, ParallelBlock, ResidualNetwork, encoder, ids, images, redrawn
from regauge.frontends.capture import capture
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph
from regauge.passes.depth.blocks import repeated_blocks, structure_of
from regauge.passes.depth.branches import OTHER_SHAPE, PROJECTED, residual_branches
from regauge.passes.depth.parts import Order, Part


def found(model: nn.Module, example: Any) -> tuple[list[Part], list[Part], Counter[str]]:
    """The branches of a model, its blocks, and what was left alone."""
    return found_in(capture(model, example if isinstance(example, tuple) else (example,)))


def found_in(graph: Graph) -> tuple[list[Part], list[Part], Counter[str]]:
    order, left = Order(graph), Counter[str]()
    branches = residual_branches(order, left)
    return branches, repeated_blocks(order, branches), left


def names(parts: list[Part]) -> list[str]:
    return [part.name for part in parts]


def test_a_decoder_has_two_branches_in_each_block() -> None:
    branches, blocks, left = found(redrawn(Decoder(3)), ids())
    assert names(blocks) == ["blocks.0", "blocks.1", "blocks.2"]
    assert names(branches)[:2] == ["blocks.0.{ln1,qkv,proj}", "blocks.0.{ln2,fc1,fc2}"]
    assert len(branches) == 6 and not left


def test_what_blocks_share_is_in_none_of_them() -> None:
    branches, blocks, _ = found(redrawn(Decoder(3)), ids())
    ops = {node.op for part in (*branches, *blocks) for node in part.nodes}
    assert "triu" not in ops and "full" not in ops and "attention" in ops


def test_an_encoder_with_norms_behind_the_sums_has_whole_blocks() -> None:
    branches, blocks, _ = found(encoder(3), torch.randn(2, 5, 16))
    assert names(blocks) == ["layers.0", "layers.1", "layers.2"]
    assert names(branches)[:2] == ["layers.0.self_attn", "layers.0.{linear1,linear2}"]
    assert [part.nodes[-1].op for part in blocks] == ["layer_norm"] * 3


def test_parallel_branches_go_alone_or_together() -> None:
    branches, blocks, _ = found(redrawn(Decoder(2, ParallelBlock)), ids())
    assert names(blocks) == ["blocks.0", "blocks.1"]
    assert names(branches)[:3] == ["blocks.0.{ln2,fc1,fc2}", "blocks.0.{ln1,qkv,proj}", "blocks.0"]
    assert len(branches) == 6


def test_a_residual_network_keeps_blocks_whose_shortcut_has_weights() -> None:
    branches, blocks, left = found(redrawn(ResidualNetwork()), images())
    assert names(branches) == ["blocks.0", "blocks.1", "blocks.2", "blocks.4"]
    assert names(blocks) == names(branches)
    assert left == {PROJECTED: 1}


def test_layers_in_a_row_without_shortcuts_are_blocks_where_they_repeat() -> None:
    layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.Tanh())]
    branches, blocks, _ = found(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), *layers, nn.Linear(8, 2)), torch.randn(3, 4))
    assert not branches
    assert names(blocks) == ["2", "4", "6"]


def test_blocks_of_other_widths_are_told_apart() -> None:
    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6)]
    _, blocks, _ = found(nn.Sequential(*layers), torch.randn(3, 8))
    assert names(blocks) == ["0", "2"]


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.fc = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.gamma * self.fc(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Biased(nn.Module):
    """Attention scores with a mask as an input: no residual sum, whatever the shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) + mask, -1) @ self.v(x)
        return x


def test_a_branch_may_end_in_a_scale_and_a_permute() -> None:
    branches, _, _ = found(nn.Sequential(LayerScale(), nn.Conv2d(4, 2, 1)), torch.randn(2, 4, 5, 5))
    assert len(branches) == 1 and branches[0].nodes[-1].op == "add"


def test_scores_and_a_mask_are_no_residual_sum() -> None:
    branches, _, _ = found(Biased(), (torch.randn(2, 3, 4), torch.zeros(2, 3, 3)))
    assert all(part.nodes[-1].inputs[0] is part.source for part in branches)
    assert all(part.result.shape == (2, 3, 4) for part in branches)


def test_a_branch_that_broadcasts_its_shortcut_is_left_alone() -> None:
    graph = Graph("broadcast")
    build = Builder(graph)
    x = build.input("x", (1, 4), torch.float64)
    wide = build.expand(build.linear(x, build.parameter("w", torch.randn(4, 4).double())), shape=(3, 4))
    graph.outputs = [build.tanh(build.add(x, wide))]
    branches, blocks, left = found_in(graph)
    assert not branches and not blocks and left == {OTHER_SHAPE: 1}


def test_every_addend_of_a_long_sum_is_a_branch() -> None:
    graph = Graph("experts")
    build = Builder(graph)
    x = total = build.input("x", (3, 4), torch.float64)
    for expert in range(5):
        weight = build.parameter(f"experts.{expert}.weight", torch.randn(4, 4).double())
        total = build.add(total, build.linear(build.tanh(x), weight))
    graph.outputs = [build.tanh(total)]
    branches, _, left = found_in(graph)
    assert names(branches) == [f"experts.{expert}" for expert in range(5)] and not left


def test_structure_tells_wiring_apart() -> None:
    graph = Graph("wiring")
    build = Builder(graph)
    x = build.input("x", (4,), torch.float64)
    a, b = build.sub(build.tanh(x), build.exp(x)), build.sub(build.exp(x), build.tanh(x))
    c = build.sub(build.tanh(x), build.exp(x))
    graph.outputs = [a, b, c]
    first, second, third = (structure_of(x, y, set(Order(graph).needed_by([y]))) for y in (a, b, c))
    assert first != second and first == third


def test_a_decoder_with_grouped_heads_and_rotary_tables() -> None:
    branches, blocks, left = found(redrawn(GroupedDecoder(3)), ids())
    assert names(blocks) == ["layers.0", "layers.1", "layers.2"]
    assert names(branches)[:2] == ["layers.0.{norm1,q,k,v,o}", "layers.0.{norm2,gate,up,down}"]
    assert len(branches) == 6 and not left
    assert not {"cos", "sin"} & {node.op for part in blocks for node in part.nodes}


def test_a_llama_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    try:
        config = transformers.LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).eval()
    except ModuleNotFoundError as reason:
        pytest.skip(f"transformers cannot be used here: {reason}")
    branches, blocks, left = found(model, torch.randint(0, 30, (2, 6)))
    assert names(blocks) == [f"model.layers.{layer}" for layer in range(3)]
    assert names(branches)[:2] == [
        "model.layers.0.{input_layernorm,self_attn}", "model.layers.0.{post_attention_layernorm,mlp}"
    ]  # fmt: skip
    assert len(branches) == 6 and not left
