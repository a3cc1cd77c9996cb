"""Small causal decoders over characters, and their steps: what caches are tested on."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

import regauge
from regauge.ir.graph import Graph
from regauge.ir.states import Steps
from regauge.ir.verify import verify
from regauge.passes.decoding.cache_bytes import cache_bytes

CHARACTERS, LONGEST = 23, 24


class Attention(nn.Module):
    """Rotary positions; ``groups`` heads of keys and values for ``heads`` of queries, written in ways of a ``kind``."""

    def __init__(self, width: int, heads: int, groups: int, kind: str) -> None:
        super().__init__()
        self.heads, self.groups, self.kind, size = heads, groups, kind, width // heads
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(width, groups * size, bias=False), nn.Linear(width, groups * size, bias=False)
        if kind == "fused":
            self.qkv = nn.Linear(width, width + 2 * groups * size, bias=False)
            del self.q, self.k, self.v
        if kind == "normed":
            self.norms = nn.ModuleList(nn.RMSNorm(size, eps=1e-6) for _ in range(2))
        self.register_buffer("speeds", 100.0 ** -torch.arange(0, 1, 2 / size))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[-2]).float()[:, None] * self.speeds
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        if self.kind == "fused":
            shared = self.groups * (width // self.heads)
            parts = self.qkv(x).split([width, shared, shared], -1)
        else:
            parts = self.q(x), self.k(x), self.v(x)
        q, k, v = (
            part.view(batch, length, heads, -1).transpose(1, 2)
            for part, heads in zip(parts, (self.heads, self.groups, self.groups), strict=True)
        )
        if self.kind == "normed":
            q, k = (norm(part) for norm, part in zip(self.norms, (q, k), strict=True))
        q, k = self.turned(q), self.turned(k)
        if self.kind in ("shared", "fused", "normed"):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (k, v))
            later = torch.full((length, length), -math.inf, dtype=x.dtype).triu(1)
            if self.kind == "mask":
                y = F.scaled_dot_product_attention(q, k, v, later)
            else:
                y = (q @ k.transpose(-1, -2) / math.sqrt(width / self.heads) + later).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(batch, length, width))


class Rotary(nn.Module):
    """Two blocks with rotary positions, as Llama has them."""

    def __init__(self, kind: str = "shared", width: int = 32, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(CHARACTERS, width)
        self.attentions = nn.ModuleList(Attention(width, heads, groups, kind) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(5))
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        x = self.table(characters)
        for block, attention in enumerate(self.attentions):
            x = x + attention(self.norms[2 * block](x))
            x = x + self.downs[block](F.silu(self.ups[block](self.norms[2 * block + 1](x))))
        return self.head(self.norms[4](x))


def with_uneven_channels(model: Rotary) -> Rotary:
    """The same function, with channels of keys that differ up to a hundredfold; queries make up for it by pairs."""
    for attention in model.attentions:
        gain = torch.logspace(-1, 1, 4).repeat(2)
        for layer, scales in ((attention.q, (1 / gain).repeat(4)), (attention.k, gain.repeat(2))):
            layer.weight.data.mul_(scales[:, None])
    return model


class Placed(nn.Module):
    """Two blocks with one projection for queries, keys and values, and a table of places, as GPT-2 has them.

    In a ``flat`` one layers read sequences and positions as one axis.
    """

    def __init__(self, width: int = 32, heads: int = 4, *, flat: bool = False) -> None:
        super().__init__()
        self.heads, self.flat = heads, flat
        self.table, self.places = nn.Embedding(CHARACTERS, width), nn.Embedding(LONGEST, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        batch, length = characters.shape
        x = self.table(characters) + self.places(torch.arange(length))
        for qkv, out, norm in zip(self.qkv, self.out, self.norms, strict=False):
            y = norm(x).flatten(0, 1) if self.flat else norm(x)
            parts = qkv(y).view(batch, length, -1).chunk(3, -1)
            q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(mixed.transpose(1, 2).reshape(*y.shape[:-1], -1)).view_as(x)
        return F.linear(self.norms[2](x), self.table.weight)


class Reader(nn.Module):
    """The embedding of characters lies near a few directions, as what trained layers read does."""

    def __init__(self, inner: Placed | Rotary) -> None:
        super().__init__()
        self.inner = inner
        table = inner.table.weight.data
        table.copy_(torch.randn(CHARACTERS, 32) * torch.logspace(0, -2, 32) @ torch.linalg.qr(torch.randn(32, 32))[0])
        if isinstance(inner, Placed):
            inner.places.weight.data.mul_(0.1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(tokens)


def decoder(model: nn.Module) -> Graph:
    """The graph of a decoder, for any number of sequences and of positions up to LONGEST.

    To trace two dynamic axes takes a second, so models that are equal to the last weight are traced once.
    """
    content = io.BytesIO()
    try:
        _Contents(content).dump(model.eval())
    except AttributeError:  # of a class that a test has for itself
        return _traced(model)
    if content.getvalue() not in _TRACED:
        with torch.random.fork_rng(devices=[]):  # what is drawn behind it does not tell whether it was traced
            own = copy.deepcopy(model)  # whatever becomes of the weights of the other
            _TRACED[content.getvalue()] = _traced(own)
    return _TRACED[content.getvalue()].copy()


_TRACED: dict[bytes, Graph] = {}


def _traced(model: nn.Module) -> Graph:
    dynamic = {0: {0: "batch", 1: ("length", 1, LONGEST)}}
    return regauge.capture(model.eval(), (characters(2, 5),), dynamic=dynamic)


class _Contents(pickle.Pickler):
    """Equal models give equal bytes, of the numbers in their tensors and not of where these lie."""

    def persistent_id(self, obj: object) -> object:
        return (obj.shape, obj.dtype, obj.detach().numpy().tobytes()) if isinstance(obj, torch.Tensor) else None


def characters(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, CHARACTERS, (batch, length), generator=torch.Generator().manual_seed(seed))


def stepped(steps: Steps, tokens: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The first results of runs over so many positions each, side by side."""
    return torch.cat([steps(part)[0] for part in tokens.split(list(counts), 1)], 1)


def check_latents_of_half(graph: Graph, step: str, *, with_data: bool) -> None:
    """A step leaves what a decoder computes, whose keys and values have half their rank, and halves its caches."""
    tokens = characters(40, LONGEST)
    small = regauge.optimize(graph, step, data=[tokens] if with_data else None)
    verify(small, axes=True)
    (wanted,), (found,) = graph.run(tokens[:4]), small.run(tokens[:4])
    assert float((wanted - found).abs().max()) < (1e-5 if with_data else 1e-10) * float(wanted.abs().max())
    cached = regauge.optimize(small, "kv-cache")
    assert cache_bytes(cached) == cache_bytes(regauge.optimize(graph, "simplify,kv-cache")) / 2
    torch.testing.assert_close(stepped(Steps(cached), tokens[:2, :9], (4, 1, 1, 3)), found[:2, :9])


def of_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix of a rank."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
