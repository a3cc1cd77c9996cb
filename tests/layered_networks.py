"""Small networks of repeated blocks, one of each family, for passes that look at depth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 16


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def attention(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.ln1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(self.ln2(x))))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, mask)
        return x + self.mlp(x)


class ParallelBlock(PreNormBlock):
    """x + (attention(norm(x)) + mlp(norm(x)))."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + (self.attention(x, mask) + self.mlp(x))


class GroupedBlock(nn.Module):
    """Rotary attention of four heads with two of keys and values, and a gated hidden layer, both behind RMS norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, width, bias=False) for width in (WIDTH, WIDTH // 2, WIDTH // 2))
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 24, bias=False), nn.Linear(WIDTH, 24, bias=False)
        self.down = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = (part * cos + torch.cat([-part[..., 2:], part[..., :2]], -1) * sin for part in (q, k))
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class GroupedDecoder(nn.Module):
    """Embedded indices, blocks that share rotary tables, and a head."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.tok = nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(GroupedBlock() for _ in range(blocks))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 20, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(ids.shape[1]).float(), torch.tensor([1.0, 0.1]).repeat(2))
        cos, sin, x = angles.cos(), angles.sin(), self.tok(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


class Decoder(nn.Module):
    """Embedded indices [batch, length], blocks that share a causal mask, and a head."""

    def __init__(self, blocks: int = 3, kind: type[PreNormBlock] = PreNormBlock) -> None:
        super().__init__()
        self.tok = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(blocks))
        self.ln, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        mask = torch.triu(torch.full((length, length), -1e4), diagonal=1)
        x = self.tok(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.ln(x))


def encoder(layers: int = 3) -> nn.TransformerEncoder:
    """torch's own encoder, with the norms behind the sums."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, which has a convolution of its own where the shape changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResidualNetwork(nn.Module):
    """Images [batch, 3, 8, 8] through a stem, three blocks of width 8 and two of width 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList([*(BasicBlock(8, 8) for _ in range(3)), BasicBlock(8, 16), BasicBlock(16, 16)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def redrawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode with weights drawn so that every path matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                tensor.copy_(noise / (tensor[0].numel() ** 0.5))
            elif name.endswith(("weight", "var")):
                tensor.copy_(1 + 0.1 * noise.abs())
            else:
                tensor.copy_(0.1 * noise)
    return model.eval()


def ids(count: int = 4, seed: int = 0) -> torch.Tensor:
    """Indices for a decoder."""
    return torch.randint(0, 20, (count, 6), generator=torch.Generator().manual_seed(seed))


def images(count: int = 4, seed: int = 0) -> torch.Tensor:
    """Images for a residual network."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
