"""Networks whose Dims lie within others: heads, groups and experts; and what a cut of them has to equal."""

import torch
from torch import nn

import regauge
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.ir.verify import verify


class Attention(nn.Module):
    """Four query heads that share two heads of keys and values."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 32), nn.Linear(12, 16), nn.Linear(12, 16)
        self.o, self.kind = nn.Linear(32, 12), kind
        self.gain = nn.Parameter(torch.rand(8) + 0.5)
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("angles", torch.randn(5, 4))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = self.angles.cos(), self.angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        if self.kind == "rotary":
            q, k = self.turned(q), self.turned(k)
        if self.kind == "gain":
            q = q * self.gain
        if self.kind == "mixed values":
            v = torch.einsum("gh,bhsd->bgsd", self.mix[:2, :2], v) + v
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        scores = q @ k.transpose(-2, -1) / 8**0.5
        if self.kind == "mixed scores":
            scores = torch.einsum("gh,bhls->bgls", self.mix, scores)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Experts(nn.Module):
    """Two experts that all rows go through, as one batch of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 12, 10)), nn.Parameter(torch.randn(2, 10, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.einsum("nsi,eio->nseo", x, self.up).relu()
        return torch.einsum("nseo,eoi->nsi", hidden, self.down)


class FusedHeads(nn.Module):
    """Queries, keys and values of one projection, in three parts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(12, 48), nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(-2))


class Groups(nn.Module):
    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(5, 6 * groups, 3), nn.Conv1d(6 * groups, 4 * groups, 1, groups=groups)
        self.c = nn.Conv1d(4 * groups, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Sums(nn.Module):
    """Each head looks at the sum of all others: their sizes are lined up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).unflatten(-1, (4, 4))
        return self.b((y @ y.transpose(-2, -1) @ y).flatten(-2))


class Gates(nn.Module):
    """Six heads, (2 x 3), of four channels, with one gate for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(12, 24), nn.Linear(24, 12), nn.Parameter(torch.randn(2, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b((self.a(x).unflatten(-1, (2, 3, 4)) * self.gate).relu().flatten(-3))


def captured(model: nn.Module) -> Graph:
    model = model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return regauge.capture(model, (torch.randn(2, 5, 12).double(),), dynamic={0: {0: "batch"}})


def expect_masked(graph: Graph, small: Graph, inputs: list[torch.Tensor]) -> None:
    """A cut graph computes what the whole one computes without the values that are gone; each occurs once."""
    verify(small, axes=True)
    masked = {
        name: torch.where(torch.isin(p.tensor, small.parameters[name].tensor), p.tensor, 0.0)
        for name, p in graph.parameters.items()
        if p.kind == "parameter"
    }
    for a, b in zip(run(small, inputs), run(graph, inputs, weights=masked), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
