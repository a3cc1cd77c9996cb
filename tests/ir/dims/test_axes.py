"""The analysis of whole graphs: what is pinned beyond what single rules say."""

import torch
from torch import nn

import regauge
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph


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


class _LearnedTokens(nn.Module):
    """Four learned tokens beside those of the input; all attend to all."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(1, 4, 8))
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1))
        query, key, value = self.qkv(h).chunk(3, -1)
        result: torch.Tensor = self.out(torch.softmax(query @ key.transpose(1, 2), -1) @ value)
        return result.mean(1)


def test_learned_tokens_in_a_softmax_are_kept() -> None:
    graph = regauge.capture(_LearnedTokens().eval(), (torch.randn(2, 6, 8),))
    (group,) = [g for g in graph.groups() if any(str(m) == "tokens:1" for m in g.members)]
    assert not group.free and "learned entries" in str(group.pins[0])


def test_a_memory_that_weights_read_is_cut() -> None:
    memory = nn.Sequential(nn.Linear(8, 16), nn.Softmax(-1), nn.Linear(16, 3)).eval()
    graph = regauge.capture(memory, (torch.randn(2, 8),))
    assert [g.size for g in graph.groups() if g.free] == [16]


def test_parameters_that_nothing_reads_keep_their_shape() -> None:
    graph = Graph("unread")
    build = Builder(graph)
    x = build.input("x", (2, 6), torch.float32)
    build.parameter("spare", torch.randn(8, 8))
    hidden = build.linear(x, build.parameter("up", torch.randn(8, 6)))
    graph.outputs = [build.linear(hidden, build.parameter("down", torch.randn(3, 8)))]
    pruned = regauge.optimize(graph, "prune{ratio=0.5}")
    assert [tuple(p.shape) for p in pruned.parameters.values()] == [(8, 8), (4, 6), (3, 4)]
    assert "no node reads it" in graph.explain("spare:0")


def test_a_long_axis_that_meets_itself_a_few_indices_on_is_kept() -> None:
    """Differences of neighbours tie each index to the next: the analysis once went as deep as the axis was long."""

    class Differences(nn.Module):
        def __init__(self, step: int) -> None:
            super().__init__()
            self.up, self.step = nn.Linear(3, 2000), step
            self.down = nn.Linear(2000 - step, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(x)
            result: torch.Tensor = self.down(y[:, self.step :] - y[:, : -self.step])
            return result

    few = regauge.capture(Differences(1).eval(), (torch.randn(2, 3),))
    assert not any(group.free for group in few.groups())
    halves = regauge.capture(Differences(1000).eval(), (torch.randn(2, 3),))
    assert [group.size for group in halves.groups() if group.free] == [1000]
