"""The analysis of whole graphs: what is pinned beyond what single rules say."""

import torch
from torch import nn

import regauge


class _GlobalTokens(nn.Module):
    """Four learned tokens, looked up by position, that every entry of the input attends to."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(4, 8)
        self.key = nn.Linear(8, 12)
        self.query = nn.Linear(5, 12)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens(torch.arange(4, device=x.device).expand(x.shape[0], 4))
        weights = (self.query(x) @ self.key(tokens).transpose(1, 2)).softmax(-1)
        result: torch.Tensor = self.out(weights @ tokens)
        return result


def test_positions_of_a_table_that_no_weight_has_are_kept() -> None:
    model = _GlobalTokens().eval()
    x = torch.randn(2, 6, 5)
    graph = regauge.capture(model, (x,))
    table = next(p for p in graph.all_parameters() if p.kind == "constant")
    assert any(pin.reason.startswith("it counts positions") for e in graph.axes.axes(table) for pin in e.pins)  # type: ignore[union-attr]
    small = regauge.optimize(graph, "prune{ratio=0.5}").to_torch()
    assert {n: tuple(p.shape) for n, p in small.named_parameters()}["key.weight"] == (6, 4)
    assert "computed over the kept" not in str(regauge.optimize(graph, "prune{ratio=0.5}").report)
