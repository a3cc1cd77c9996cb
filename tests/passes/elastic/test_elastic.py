"""Nested networks: the order is exact, prefixes are cuts, budgets are met, and widths trained together work."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from digits_training import accuracy, captured, convolutional, digits, train
from regauge.ir.cost import figures
from regauge.ir.dims.reorder import reorder
from regauge.passes.elastic.supernet import Supernet
from small_graphs import residual_network


def test_reordering_is_exact_and_prefixes_hold_the_best_indices() -> None:
    graph = residual_network()
    nested = regauge.elastic(graph)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(nested.graph.run(x), graph.run(x), rtol=1e-12, atol=1e-12)
    for scores in nested.scores.values():
        assert bool(np.all(np.diff(scores) <= 0))
    half, quarter = nested.at(0.5), nested.at(0.25)
    name = "stem.weight"
    assert half.parameters[name].shape[0] == 8
    assert torch.equal(quarter.parameters[name].tensor, half.parameters[name].tensor[:4])
    lost = {name: scores[len(scores) // 2 :].sum() / scores.sum() for name, scores in nested.scores.items()}
    told = [str(cut) for cut in half.report.passes[0].cuts]
    assert told == [
        f"{name}: {len(nested.scores[name])} -> {len(nested.scores[name]) // 2}, {share:.1%} of its scores"
        for name, share in lost.items()
    ]
    assert half.report.after.macs < half.report.before.macs == figures(graph).macs
    pruned = regauge.optimize(graph, "prune{ratio=0.5,score=l2,compensate=false}")
    torch.testing.assert_close(half.run(x), pruned.run(x), rtol=1e-10, atol=1e-10)


def test_where_nothing_can_be_ordered_sort_leaves_the_graph_as_it_is() -> None:
    """It stopped the pipeline; and ``elastic``, which has nothing to give, says why in words."""
    graph = regauge.capture(nn.Linear(4, 3), (torch.randn(2, 4),))
    (entry,) = regauge.optimize(graph, "sort").report.passes
    assert not entry.changed and entry.left["it is an axis of a graph input"] == 1
    with pytest.raises(regauge.RegaugeError, match="elastic: 1 x it is an axis of a graph output, 1 x it is an axis"):
        regauge.elastic(graph)


def test_attention_is_reordered_exactly() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu").double().eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    graph = regauge.capture(nn.Sequential(layer, nn.Linear(16, 3).double()).eval(), (x,))
    nested = regauge.elastic(graph, score_by="random")
    assert sum(len(scores) for scores in nested.scores.values()) == 40  # heads, head sizes, hidden units
    torch.testing.assert_close(nested.graph.run(x), graph.run(x), rtol=1e-10, atol=1e-10)
    assert figures(nested.at(0.5)).macs < 0.5 * figures(graph).macs


def test_widths_by_layer_and_mixes_meet_budgets() -> None:
    graph = captured(convolutional())
    nested = regauge.elastic(graph)
    by_layer = nested.at({"3.weight:0": 0.25, "*": 0.5})
    assert [by_layer.parameters[f"{i}.weight"].shape[0] for i in (0, 3, 6)] == [8, 8, 16]
    counts = nested.mix(macs=0.4)
    mixed = nested.cut_to(counts)
    assert figures(mixed).macs <= 0.4 * figures(graph).macs
    sizes = {"0.weight:0": 16, "3.weight:0": 32, "6.weight:0": 32}
    assert all(counts[name] / size in (0.25, 0.5, 0.75, 1.0) for name, size in sizes.items())
    uniform = nested.cut_to(nested.uniform(macs=0.4))
    assert 0.39 * figures(graph).macs < figures(uniform).macs <= 0.4 * figures(graph).macs
    for budget in (nested.mix, nested.uniform):
        with pytest.raises(regauge.RegaugeError, match="cannot be met"):
            budget(macs=0.001)


def test_scores_of_ones_own_and_rounding() -> None:
    graph = captured(convolutional())
    nested = regauge.elastic(graph, score_by={"0.weight:0": range(16)}, round_to=4)
    assert list(nested.scores) == ["0.weight:0"]
    assert torch.equal(nested.graph.parameters["0.weight"].tensor, graph.parameters["0.weight"].tensor.flip(0))
    assert nested.counts(0.3) == {"0.weight:0": 4}


def test_sort_is_an_exact_pass() -> None:
    graph = residual_network()
    report = regauge.optimize(graph, "sort{score=l1,exclude=[head.weight]}").report
    assert report.passes[0].error < 1e-12
    assert report.passes[0].notes == ("2 Dims sorted",)
    assert report.before == report.after


def test_errors_say_what_to_do() -> None:
    graph = captured(convolutional())
    nested = regauge.elastic(graph)
    with pytest.raises(regauge.RegaugeError, match="above 0, up to 1"):
        nested.at(1.5)
    with pytest.raises(regauge.RegaugeError, match="matches no elastic Dim"):
        nested.at({"nowhere*": 0.5})
    group = next(group for group in graph.groups() if group.pins)
    with pytest.raises(regauge.RegaugeError, match="cannot be reordered"):
        reorder(graph, {group.dim: range(int(group.size))})


def test_a_loaded_onnx_file_is_elastic(tmp_path: object) -> None:
    path = captured(convolutional()).to_onnx(f"{tmp_path}/digits.onnx")
    graph = regauge.load(path)
    nested = regauge.elastic(graph)
    x = digits()[2][:4]
    np.testing.assert_allclose(nested.graph.run(x)[0], graph.run(x)[0], rtol=1e-4, atol=1e-5)
    small = nested.at(0.5).to_onnx(f"{tmp_path}/half.onnx")
    assert small.stat().st_size < 0.5 * path.stat().st_size


def test_a_step_at_a_narrow_width_moves_only_its_slices() -> None:
    net = Supernet(regauge.elastic(captured(convolutional())), widths=(0.5,)).train()
    net(torch.rand(4, 1, 8, 8), width=0.5).sum().backward()
    gradient = net.full.get_parameter("0.weight").grad
    assert bool((gradient[:8] != 0).any()) and not gradient[8:].any()
    assert {name.removeprefix("full.") for name, _ in net.named_parameters()} == set(
        dict(convolutional().named_parameters())
    )


class Rotary(nn.Module):
    """Queries turned by their places: the table of angles is a constant as wide as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.q(x), self.k(x)
        angle = torch.outer(torch.arange(5.0), 100 ** -torch.arange(0, 1, 0.25)).double()
        cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
        q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
        return q @ k.transpose(-1, -2)


def test_a_narrow_width_has_constants_of_its_own_size() -> None:
    """The table is no weight of the graph that has a slice, but folded when the module was emitted."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    nested = regauge.elastic(regauge.capture(Rotary().double(), (x,)))
    (scores,) = nested.scores.values()
    assert len(scores) == 4
    net = Supernet(nested, widths=(0.5,))
    torch.testing.assert_close(net(x, width=0.5), nested.at(0.5).run((x,))[0])


def test_widths_trained_together_all_work() -> None:
    model = convolutional()
    train(model, 150)
    nested = regauge.elastic(captured(model))
    images, labels, _, _ = digits()
    batches = list(itertools.islice(images.split(200), 4))
    untrained = {width: accuracy(nested.at(width).to_torch()) for width in (0.25, 0.5)}
    net = Supernet(nested, widths=(0.25, 0.5, 0.75), mixes={"small": nested.mix(macs=0.3)}).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    torch.manual_seed(0)
    for _ in range(150):
        batch = torch.randint(len(images), (64,))
        net.sandwich(
            (images[batch],), lambda out, batch=batch: nn.functional.cross_entropy(out, labels[batch])
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval()
    quarter, half, full = (net.at(width, batches).to_torch() for width in (0.25, 0.5, 1.0))
    assert accuracy(quarter) > max(0.8, untrained[0.25])
    assert accuracy(half) > max(0.88, untrained[0.5])
    assert accuracy(full) > 0.9
    small = net.at("small", batches)
    assert "of its scores" in str(small.report)
    assert figures(small).macs <= 0.3 * figures(nested.graph).macs
    assert accuracy(small.to_torch()) > 0.88
    inside = net(digits()[2], width=0.5)
    torch.testing.assert_close(net.trained().at(0.5).to_torch()(digits()[2]), inside, rtol=1e-4, atol=1e-4)


class TiedHead(nn.Module):
    """A language model whose head is its embedding, read in one of the ways in which that is written."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed, self.places, self.norm = nn.Embedding(11, 8), nn.Embedding(6, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.form == "one hot":
            x = nn.functional.one_hot(tokens, 11).to(self.embed.weight.dtype) @ self.embed.weight
        else:
            x = self.embed(tokens) * (8**0.5 if self.form == "scaled" else 1)
        x = x + self.places(torch.arange(6))
        x = x + self.down(self.up(self.norm(x)).relu())
        if self.form == "transposed":
            return x @ self.embed.weight.t()
        result: torch.Tensor = self.head(x)
        return result


@pytest.mark.parametrize("form", ["linear", "transposed", "scaled", "one hot"])
def test_a_width_tied_between_embedding_and_head_is_ordered_exactly(form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TiedHead(form).double().eval()
    tokens = torch.randint(11, (2, 6))
    graph = regauge.capture(model, (tokens,))
    nested = regauge.elastic(graph, score_by="random", seed=1)
    assert {name: len(scores) for name, scores in nested.scores.items()} == {"embed.weight:1": 8, "up.weight:0": 16}
    torch.testing.assert_close(nested.graph.run(tokens), graph.run(tokens), rtol=1e-12, atol=1e-12)
    ordered = nested.graph.parameters["embed.weight"].tensor
    assert sorted(ordered[0].tolist()) == sorted(model.embed.weight[0].tolist())
    assert not torch.equal(ordered, model.embed.weight)
    half = nested.at(0.5)
    assert half.parameters["embed.weight"].shape == (11, 4)
    net = Supernet(nested, widths=(0.5,)).eval()
    torch.testing.assert_close(net(tokens, width=0.5), half.run(tokens)[0])
    assert sum(p.numel() for p in net.full.parameters()) == sum(p.numel() for p in model.parameters()), "still tied"
    report = regauge.optimize(regauge.load(graph.to_onnx(tmp_path / "tied.onnx")), "sort").report.passes[0]
    assert report.changed and report.error is not None and report.error < 1e-12
