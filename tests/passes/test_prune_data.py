"""``prune`` with data: what it keeps, how it repairs what is left, and what it asks of the data."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regauge
from regauge.frontends.capture import capture
from regauge.ir.cost import figures
from regauge.ir.errors import GraphError, PassError, RegaugeError
from regauge.ir.graph import Graph


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """Two blocks with batch norms and shortcuts, of which nothing is trained; every channel is used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
                nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def network() -> Graph:
    torch.manual_seed(0)
    model = Residual()
    for _ in range(20):
        model(images(32, seed=1))  # running statistics
    return capture(model.eval(), (images(2),), dynamic={0: {0: "batch"}})


def error(graph: Graph, pruned: Graph, x: torch.Tensor) -> float:
    """The squared error of the outputs, as a share of their variance."""
    (y,), (z,) = graph.run(x), pruned.run(x)
    return float((z - y).square().sum() / (y - y.mean(0)).square().sum())


def doubled(width: int) -> nn.Sequential:
    """A network whose hidden units all come twice."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2 * width), nn.GELU(), nn.Linear(2 * width, 4))
    with torch.no_grad():
        model[0].weight[width:] = model[0].weight[:width]
        model[0].bias[width:] = model[0].bias[:width]
    return model


def test_what_others_can_take_over_goes_and_nothing_is_lost() -> None:
    model, x = doubled(10), torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    graph = capture(model, (x,))
    pruned = regauge.optimize(graph, "prune{ratio=0.5}", data=[(x,)])
    assert error(graph, pruned, x) < 3e-3  # the ridge keeps weights near what they were
    assert error(graph, regauge.optimize(graph, "prune{ratio=0.5,compensate=false}"), x) > 0.05
    assert "layers refitted on 400 examples: 1" in str(pruned.report)


def test_refitted_networks_are_nearer_on_images_that_were_not_seen() -> None:
    graph, batches, unseen = network(), [(images(64, seed),) for seed in (2, 3)], images(200, 9)
    masked = error(graph, regauge.optimize(graph, "prune{macs=0.5,compensate=false}"), unseen)
    chosen = error(graph, regauge.optimize(graph, "prune{macs=0.5,compensate=false}", data=batches), unseen)
    repaired = error(graph, regauge.optimize(graph, "prune{macs=0.5}", data=batches), unseen)
    uniform = error(graph, regauge.optimize(graph, "prune{macs=0.5,score=l2}", data=batches), unseen)
    assert repaired < chosen < masked and repaired < uniform < masked
    assert repaired < 0.25 * masked


def test_budgets_are_met_with_data_too() -> None:
    graph = network()
    small = regauge.optimize(graph, "prune{macs=0.6}", data=[(images(32),)])
    assert 0.98 * 0.6 <= figures(small).macs / figures(graph).macs <= 0.6


def test_a_loader_of_labelled_examples_is_data() -> None:
    loader = DataLoader(TensorDataset(images(24), torch.zeros(24, dtype=torch.int64)), batch_size=8)
    small = regauge.optimize(network(), "prune{macs=0.6}", data=loader)
    assert "refitted on 24 examples" in str(small.report)
    module = small.to_torch()
    torch.testing.assert_close(module(images(4)), small.run(images(4))[0], rtol=1e-4, atol=1e-4)


def test_heads_and_head_sizes_are_scored_by_data() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True).eval()
    x = torch.randn(8, 6, 32)
    graph = capture(layer, (x,))
    pruned = regauge.optimize(graph, "prune{ratio=0.5}", data=[(x,)])
    assert figures(pruned).parameters < 0.5 * figures(graph).parameters
    assert error(graph, pruned, x) < error(graph, regauge.optimize(graph, "prune{ratio=0.5,compensate=false}"), x)


@pytest.mark.parametrize("score", ["l2", "distortion"])
def test_infinite_inputs_are_told_with_their_layer(score: str) -> None:
    with pytest.raises(PassError, match="infinite numbers on the calibration data"):
        regauge.optimize(network(), f"prune{{macs=0.5,score={score}}}", data=[(images(2) * torch.inf,)])


def test_batches_of_another_rank_are_told_with_the_input() -> None:
    with pytest.raises(
        GraphError, match=r"x is f32\[3,8,8\], the model takes f32\[batch,3,8,8\]: give it in that shape"
    ):
        regauge.optimize(network(), "prune{macs=0.5}", data=[(images(2)[0],)])


class Scored(nn.Module):
    """A Dim that a product sums over, one that a sum does, and one that a layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.a, self.b, self.out = nn.Linear(8, 10), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.q(x) @ self.k(x).t()
        result: torch.Tensor = (
            scores.sum(-1, keepdim=True) + self.a(x).tanh().sum(-1, keepdim=True) + self.out(self.b(x))
        )
        return result


def test_the_report_says_of_each_dim_what_nothing_makes_up_for() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    graph = regauge.capture(Scored().eval(), (x,))
    report = regauge.optimize(graph, "prune{ratio=0.5}", data=[x]).report
    lost = {cut.dim: cut.lost for cut in report.passes[0].cuts}
    assert lost == {"q.weight:0": ("matmul reads it",), "a.weight:0": ("sum reads it",), "b.weight:0": ()}
    assert "a.weight:0: 10 -> 5; not made up for: sum reads it" in str(report)
    plain = regauge.optimize(graph, "prune{ratio=0.5,compensate=false}", data=[x]).report
    assert not any(cut.lost for cut in plain.passes[0].cuts), "nothing was to be made up for"


@pytest.mark.parametrize("passes", ["prune{macs=0.5}", "sparsify"])
def test_batches_without_an_example_are_refused(passes: str) -> None:
    with pytest.raises(PassError, match="data holds no example"):
        regauge.optimize(network(), passes, data=[images(2)[:0]])


def test_an_input_of_another_width_is_taken() -> None:
    """numpy makes double precision where nothing else is said."""
    graph, x = network(), images(2)
    found = regauge.optimize(graph, "prune{macs=0.5,compensate=true}", data=[x.double().numpy()])
    expected = regauge.optimize(graph, "prune{macs=0.5,compensate=true}", data=[x])
    torch.testing.assert_close(found.run(x), expected.run(x))
    assert "x is f64[2,3,8,8], taken as f32" in found.report.passes[0].notes


def test_an_input_of_another_kind_is_told() -> None:
    with pytest.raises(
        RegaugeError, match=r"^x is i64.2,3,8,8., the model takes f32.batch,3,8,8.: give it in that type"
    ):
        regauge.optimize(network(), "prune{macs=0.5}", data=[(images(2).long(), torch.zeros(2))])


def test_options_of_inputs_made_up_say_nothing_of_data() -> None:
    small = regauge.optimize(network(), "prune{ratio=0.5,examples=8,score=l2}", data=[images(8)])
    assert any("examples and steps are of inputs made up" in note for note in small.report.passes[0].notes)
