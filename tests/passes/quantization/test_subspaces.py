"""``rotate{kind=pca}``: the same function, the directions of great variance read apart and kept in 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import regauge
from layered_networks import GroupedDecoder, ids, redrawn
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.quantization.subspaces import HIGH
from rounded_networks import in_few_bits, relative


class Gated(nn.Module):
    """A residual stream of 64 channels on a table of ids, two gated hidden layers behind norms, logits."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.table, self.last, self.head = nn.Embedding(50, 64), norm(64), nn.Linear(64, 50, bias=False)
        self.norms = nn.ModuleList(norm(64) for _ in range(2))
        self.gate, self.up = (nn.ModuleList(nn.Linear(64, 96) for _ in range(2)) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(96, 64) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for norm, gate, up, down in zip(self.norms, self.gate, self.up, self.down, strict=True):
            y = norm(x)
            x = x + down(nn.functional.silu(gate(y)) * up(y))
        return self.head(self.last(x))


def with_wide_directions(norm: type[nn.Module]) -> tuple[Graph, torch.Tensor]:
    """Vectors of the table lie near a subspace of four directions, none of which is a channel."""
    torch.manual_seed(0)
    model = redrawn(Gated(norm))
    with torch.no_grad():
        model.table.weight += 6 * torch.randn(50, 4) @ torch.randn(4, 64)
    tokens = torch.randint(0, 50, (8, 16))
    return regauge.capture(model.eval(), (tokens,), dynamic={0: {0: "batch"}}), tokens


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_wide_directions_are_read_apart(norm: type[nn.Module]) -> None:
    """The same function; with weights of 3 bits, those of the first directions of 8, less than half of the error is
    left that as many rotated channels have, and with what layers read in 8 bits less, too."""
    graph, tokens = with_wide_directions(norm)
    data = [tokens]
    found = {kind: regauge.optimize(graph, f"rotate{{kind={kind}}}", data=data) for kind in ("hadamard", "pca")}
    assert relative(graph, found["pca"], (tokens,)) < 1e-4
    assert "5 layers read 12.5% of their inputs apart" in found["pca"].report.passes[0].notes
    assert len(found["pca"].metadata[HIGH]) == 5
    step = "quantize{scheme=w3,target=reference,embeddings=false,group=8}"
    y = graph.run((tokens,))[0]
    errors = {}
    for kind, turned in found.items():
        small = regauge.optimize(turned, step)
        errors[kind] = float((small.run((tokens,))[0] - y).square().sum() / y.square().sum())
    assert errors["pca"] < 0.5 * errors["hadamard"]
    assert in_few_bits(found["pca"], (tokens,), 8) > in_few_bits(found["hadamard"], (tokens,), 8)


def test_bits_of_both_parts() -> None:
    graph, tokens = with_wide_directions(nn.RMSNorm)
    found = regauge.optimize(graph, "rotate{kind=pca,high=0.25}", data=[tokens])
    small = regauge.optimize(found, "quantize{scheme=w4,target=reference,embeddings=false}")
    codes = {p.name: p.tensor for p in small.all_parameters() if p.name.endswith("_quantized")}
    high = [tensor for name, tensor in codes.items() if "_high" in name]
    low = [tensor for name, tensor in codes.items() if "_low" in name]
    assert len(high) == len(low) == 5
    assert all(tensor.shape[1] == 16 and tensor.dtype == torch.int8 for tensor in high)
    assert all(tensor.shape[1] == 48 and int(tensor.max()) <= 15 for tensor in low)


def test_heads_that_share_keys() -> None:
    example = ids() if isinstance(ids(), tuple) else (ids(),)
    graph = regauge.capture(redrawn(GroupedDecoder(2)), example)
    found = regauge.optimize(graph, "rotate{kind=pca,high=0.3}", data=[example])
    assert relative(graph, found, example) < 2e-5
    assert any(node.op == "index_select" for node in found.nodes)  # of each head some channels


def test_options() -> None:
    graph, _ = with_wide_directions(nn.RMSNorm)
    with pytest.raises(PassError, match="needs data for kind=pca"):
        regauge.optimize(graph, "rotate{kind=pca}")
    with pytest.raises(PassError, match="high does nothing with kind=hadamard"):
        regauge.optimize(graph, "rotate{high=0.25}")
