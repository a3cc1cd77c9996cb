"""A trained character model of English plays, and text to measure it on, both of the shared corpus."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

CORPUS = Path(__file__).resolve().parent.parent.parent / "shared" / "corpus"
WIDTH, HEADS, BLOCKS, CONTEXT = 96, 6, 4, 128


class Block(nn.Module):
    """Causal attention and a hidden layer of four times the width, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.ln1(x)).chunk(3, -1)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))


class CharGPT(nn.Module):
    """Characters [batch, length] to logits [batch, length, characters]; the head is the embedding."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(BLOCKS))
        self.ln = nn.LayerNorm(WIDTH)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        x = self.tok(characters) + self.pos.weight[: characters.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln(x), self.tok.weight)


def trained() -> CharGPT:
    """The model with its trained weights; raises FileNotFoundError where the corpus is absent."""
    from safetensors.torch import load_file

    model = CharGPT(len(_vocabulary())).eval()
    model.load_state_dict(load_file(CORPUS / "weights" / "char_gpt.safetensors"))
    return model


def calibration_windows(count: int, seed: int = 0) -> torch.Tensor:
    """Windows [count, CONTEXT] drawn from the text that the model was trained on."""
    text = _text()
    training = text[: int(len(text) * 0.9)]
    starts = torch.randint(0, len(training) - CONTEXT, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([training[start : start + CONTEXT] for start in starts.tolist()])


@torch.no_grad()
def perplexity(model: nn.Module) -> float:
    """Over the first half of the validation text, in windows of CONTEXT characters."""
    text = _text()
    held_out = text[int(len(text) * 0.9) :]
    held_out = held_out[: len(held_out) // 2]
    count = (len(held_out) - 1) // CONTEXT * CONTEXT
    inputs, wanted = held_out[:count].view(-1, CONTEXT), held_out[1 : count + 1].view(-1, CONTEXT)
    total = 0.0
    for x, y in zip(inputs.split(64), wanted.split(64), strict=True):
        total += float(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum"))
    return math.exp(total / count)


def _vocabulary() -> str:
    vocabulary: str = json.loads((CORPUS / "weights" / "char_gpt.json").read_text())["vocab"]
    return vocabulary


def as_numbers(text: str) -> torch.Tensor:
    """The characters of a text that the model knows, in order, as it numbers them."""
    index = {character: number for number, character in enumerate(_vocabulary())}
    return torch.tensor([index[character] for character in text if character in index])


def _text() -> torch.Tensor:
    return as_numbers((CORPUS / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8"))
