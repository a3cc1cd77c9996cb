"""A small Llama over characters (shared key heads, rotary positions, RMS norms, gated units), trained here once.

    python benchmarks/char_llama.py        # trains it, some minutes on one core, and prints its perplexity

The weights are kept in the user's cache folder, and trained anew where they are not there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import char_gpt

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "regauge" / "char_llama.safetensors"
WIDTH, HEADS, GROUPS, BLOCKS, STEPS, BATCH = 96, 6, 2, 4, 1500, 16


class Attention(nn.Module):
    """Causal attention, three query heads for each head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, GROUPS * size, bias=False) for _ in range(2))
        self.speeds = nn.Buffer(10000.0 ** -torch.arange(0, 1, 2 / size))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[-2]).float()[:, None] * self.speeds
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, HEADS, -1).transpose(1, 2)
        k, v = (layer(x).view(batch, length, GROUPS, -1).transpose(1, 2) for layer in (self.k, self.v))
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.attention = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH), Attention()
        self.gate, self.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first(x))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class CharLlama(nn.Module):
    """Characters [batch, length] to logits [batch, length, characters]."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(characters, WIDTH), nn.Linear(WIDTH, characters, bias=False)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(BLOCKS)), nn.RMSNorm(WIDTH)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        x = self.table(characters)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def trained() -> CharLlama:
    """The model with its trained weights; raises FileNotFoundError where the corpus is absent."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    windows = char_gpt.calibration_windows(STEPS * BATCH, seed=1)
    model = CharLlama(int(windows.max()) + 1)
    if not CACHE.exists():
        _train(model, windows)
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), CACHE)
    model.load_state_dict(load_file(CACHE))
    return model.eval()


def _train(model: CharLlama, windows: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
    for step, batch in enumerate(windows.split(BATCH)):
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {float(loss):.3f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"perplexity {char_gpt.perplexity(trained()):.3f}")
