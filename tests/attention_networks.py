"""Attention as models write it: fused and grouped heads, rotary positions in several notations, norms and caches."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, SIZE, LENGTH = 12, 8, 5


def half_rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Llama's: pairs are half a head apart."""
    cos, sin = (torch.cat([f, f], -1) for f in (angles.cos(), angles.sin()))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def interleaved(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """GPT-J's: pairs are neighbours."""
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def complex_rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """The original Llama's: neighbours are complex numbers."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def partly_rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """GPT-NeoX's: only the first half of a head."""
    return torch.cat([half_rotated(x[..., : SIZE // 2], angles[..., : SIZE // 4]), x[..., SIZE // 2 :]], -1)


def stretched(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """No rotation: the two entries of a pair have other angles."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * (2 * angles).sin()], -1)


ROTATIONS = {
    "": None,
    "half": half_rotated,
    "interleaved": interleaved,
    "complex": complex_rotated,
    "partly": partly_rotated,
    "stretched": stretched,
}


class Decoder(nn.Module):
    """Four query heads on ``kv`` heads of keys and values; a layer for all three, or one each."""

    def __init__(self, rotation: str = "", *, kv: int = 2, fused: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.kv, self.fused, self.rotated = kv, fused, ROTATIONS[rotation]
        self.qkv = nn.Linear(WIDTH, (4 + 2 * kv) * SIZE) if fused else None
        if not fused:
            self.q, self.k, self.v = (nn.Linear(WIDTH, heads * SIZE) for heads in (4, kv, kv))
        self.norm = nn.RMSNorm(SIZE) if norm else nn.Identity()
        self.o = nn.Linear(4 * SIZE, WIDTH)
        self.register_buffer("angles", torch.randn(LENGTH, SIZE // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [4 * SIZE, self.kv * SIZE, self.kv * SIZE]
        parts = self.qkv(x).split(sizes, -1) if self.qkv is not None else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in parts)
        q, k = self.norm(q), self.norm(k)
        if self.rotated is not None:
            q, k = self.rotated(q, self.angles), self.rotated(k, self.angles)
        k, v = (part.repeat_interleave(4 // self.kv, 1) for part in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
