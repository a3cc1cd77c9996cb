"""Blocks of well-known networks, written by hand as their authors do, and what they consist of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn, randn

HEADS, DEPTH, TIME = 4, 4, 6
WIDTH = HEADS * DEPTH


def split(x: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    return x.view(x.shape[0], x.shape[1], heads, DEPTH).transpose(1, 2)


def join(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], WIDTH)


class Bert(nn.Module):
    """Post-norm, an integer mask, and gelu by its error function."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, WIDTH), nn.Embedding(TIME, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, eps=1e-12) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down, self.drop = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), nn.Dropout(0.1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](self.words(ids) + self.places(torch.arange(TIME)))
        bias = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        scores = split(self.q(x)) @ split(self.k(x)).transpose(-1, -2) / math.sqrt(DEPTH) + bias
        x = self.norms[1](x + self.o(join(self.drop(torch.softmax(scores, -1)) @ split(self.v(x)))))
        y = self.up(x)
        return self.norms[2](x + self.down(y * 0.5 * (1.0 + torch.erf(y / math.sqrt(2.0)))))


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is stored (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(randn(inputs, outputs) * 0.2), nn.Parameter(randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class Gpt2(nn.Module):
    """Pre-norm, one projection for q, k and v, a causal buffer, and gelu by tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.o = Conv1D(WIDTH, 3 * WIDTH), Conv1D(WIDTH, WIDTH)
        self.up, self.down = Conv1D(WIDTH, 32), Conv1D(32, WIDTH)
        self.register_buffer("causal", torch.tril(torch.ones(8, 8, dtype=torch.bool))[None, None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (split(part) for part in self.qkv(self.first(x)).split(WIDTH, dim=2))
        scores = q @ k.transpose(-1, -2) / math.sqrt(DEPTH)
        scores = torch.where(self.causal[:, :, :TIME, :TIME], scores, torch.finfo(scores.dtype).min)
        x = x + self.o(join(torch.softmax(scores, dim=-1) @ v))
        y = self.up(self.second(x))
        y = 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * torch.pow(y, 3.0))))
        return x + self.down(y)


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x.dtype
        x = x.to(torch.float32)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(kept)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((-x[..., DEPTH // 2 :], x[..., : DEPTH // 2]), dim=-1)


class Llama(nn.Module):
    """RMS norms, rotary positions, two query heads to a key head, and a gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = RmsNorm(), RmsNorm()
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, 2 * DEPTH, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, 24, bias=False) for _ in range(2))
        self.down = nn.Linear(24, WIDTH, bias=False)
        angles = torch.outer(torch.arange(TIME).float(), 100.0 ** -torch.arange(0, 1, 2 / DEPTH))
        self.register_buffer("cos", torch.cat((angles, angles), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angles, angles), -1).sin(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        q, k, v = split(self.q(y)), split(self.k(y), 2), split(self.v(y), 2)
        q, k = (part * self.cos + rotate_half(part) * self.sin for part in (q, k))
        k, v = (
            part[:, :, None].expand(-1, 2, 2, TIME, DEPTH).reshape(-1, HEADS, TIME, DEPTH) for part in (k, v)
        )  # fmt: skip
        causal = torch.full((TIME, TIME), torch.finfo(x.dtype).min).triu(1)
        scores = torch.matmul(q, k.transpose(2, 3)) * DEPTH**-0.5 + causal
        x = x + self.o(join(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Vit(nn.Module):
    """Patches of a picture, queries that are scaled, and gelu."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.places = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(randn(1, 4, WIDTH))
        self.first, self.second = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.places
        q, k, v = self.qkv(self.first(x)).reshape(-1, 4, 3, HEADS, DEPTH).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.o(join(((q * DEPTH**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v))
        return x + self.mlp(self.second(x))


class ConvNext(nn.Module):
    """A depthwise convolution, a norm over its channels once they are last, and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 32), nn.Linear(32, 8)
        self.gamma = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class T5(nn.Module):
    """RMS norms, no scale, a relative bias, and a rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = RmsNorm(), RmsNorm(), nn.Embedding(8, HEADS)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 32, bias=False), nn.Linear(32, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y, places = self.first(x), torch.arange(TIME)
        bias = self.table((places[None] - places[:, None]).clamp(-3, 4) + 3).permute(2, 0, 1).unsqueeze(0)
        bias = bias + (1.0 - mask[:, None, None].float()) * torch.finfo(x.dtype).min
        scores = torch.matmul(split(self.q(y)), split(self.k(y)).transpose(3, 2)) + bias
        x = x + self.o(join(torch.softmax(scores.float(), -1).type_as(scores) @ split(self.v(y))))
        return x + self.down(F.relu(self.up(self.second(x))))


class Unet(nn.Module):
    """Group norms and x * sigmoid(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8, eps=1e-6) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = norm(y)
            y = conv(y * torch.sigmoid(y))
        return x + y


class MobileNet(nn.Module):
    """Hard swishes and hard sigmoids as written before torch had them."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.squeeze, self.excite = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.expand(x)
        y = y * F.relu6(y + 3.0) / 6.0
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
        return x + self.project(y * (F.relu6(gate + 3.0) / 6.0))


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    parts: dict[str, int]
    gone: frozenset[str] = frozenset()  # weights that others take in, or that change nothing


def _tokens() -> tuple[torch.Tensor, ...]:
    return (randn(2, TIME, WIDTH),)


def _mask() -> torch.Tensor:
    return (torch.arange(TIME) < torch.tensor([[4], [6]])).long()


NETWORKS = {
    "bert": Network(
        Bert, lambda: (torch.arange(2 * TIME).reshape(2, TIME), _mask()),
        {"layer_norm": 3, "attention": 1, "gelu": 1, "linear": 6}, frozenset({"k.bias"}),
    ),
    "gpt2": Network(Gpt2, _tokens, {"layer_norm": 2, "attention": 1, "gelu": 1, "linear": 4}),
    "llama": Network(Llama, _tokens, {"rms_norm": 2, "attention": 1, "silu": 1, "linear": 7}),
    "vit": Network(Vit, lambda: (randn(2, 3, 8, 8),), {"layer_norm": 2, "attention": 1, "gelu": 1, "linear": 4}),
    "convnext": Network(
        ConvNext, lambda: (randn(2, 8, 5, 5),), {"layer_norm": 1, "gelu": 1, "linear": 2}, frozenset({"gamma"})
    ),
    "t5": Network(T5, lambda: (*_tokens(), _mask()), {"rms_norm": 2, "attention": 1, "relu": 1, "linear": 6}),
    "unet": Network(Unet, lambda: (randn(2, 8, 6, 6),), {"group_norm": 2, "silu": 2, "conv": 2}),
    "mobilenet": Network(MobileNet, lambda: (randn(2, 4, 6, 6),), {"hardswish": 1, "hardsigmoid": 1, "relu": 1}),
}  # fmt: skip
"""Networks, inputs for them, how many whole operators they consist of, and what their modules keep no weights for."""
