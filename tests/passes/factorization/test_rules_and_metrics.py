"""What factors are the best in, and rules by which ranks are shared out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.cost import figures
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.factorization.forms import Choice
from regauge.passes.factorization.metric_svd import factored
from regauge.passes.factorization.metrics import gradient_metrics
from regauge.passes.factorization.on_data import Sensitivity, problems_on_data
from regauge.passes.factorization.problems import Problem
from regauge.passes.factorization.rules import by_rule, wanted_by


class Product(nn.Module):
    """x W, the weight stored the other way round."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.t().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Weighed(nn.Module):
    """Some outputs count much more than others, and some inputs are much larger."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("share", torch.logspace(0, -2, 12).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(x) * self.share
        return found


def graph_and_data(stored: str) -> tuple[Graph, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 20, generator=generator).double()
    linear = nn.Linear(20, 12, bias=False).double()
    linear.weight = nn.Parameter(weight)
    basis = torch.randn(20, 20, generator=generator) * torch.logspace(0, -2, 20)[:, None]
    data = (torch.randn(96, 20, generator=generator) @ basis).double()
    model = Weighed(Product(weight) if stored == "matmul" else linear)
    return capture(model, (data[:2],), dynamic={0: {0: "batch"}}), data


def layers_in(graph: Graph) -> list[Layer]:
    return [layer for node in graph.nodes if (layer := layer_of(node)) is not None]


def changed_outputs(stored: str, metric: Any, rank: int = 3) -> float:
    """The mean squared change of the outputs with the first factors in a metric."""
    graph, data = graph_and_data(stored)
    layers = layers_in(graph)
    sensitivity = Sensitivity.of(graph, layers, [(data,)], 0, metric)
    ((problem,),) = problems_on_data(graph, layers, [(data,)], sensitivity)
    up, down = problem.factored.of_rank(rank)
    off = (data @ (problem.weight - up @ down).t()) * torch.logspace(0, -2, 12).double()
    return float(off.square().mean())


@pytest.mark.parametrize("stored", ["linear", "matmul"])
def test_metrics_by_what_they_know(stored: str) -> None:
    """Whichever way the weight is stored: sides are told by the names of axes."""
    lost = {name: changed_outputs(stored, name) for name in ("plain", "asvd", "whitened", "fwsvd", "gfwsvd")}
    lost["output-aware"] = changed_outputs(stored, "output-aware")
    assert lost["whitened"] < 0.9 * lost["plain"]
    assert lost["asvd"] < 0.98 * lost["plain"]
    assert lost["fwsvd"] < 0.3 * lost["plain"]
    assert lost["gfwsvd"] < 1.2 * lost["output-aware"] < 0.3 * lost["plain"]


def test_a_metric_on_the_wrong_side_is_no_better_than_plain() -> None:
    layer: Any = None
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 24, generator=generator).double()
    rows = (torch.randn(96, 24, generator=generator) @ torch.randn(24, 24, generator=generator)).double()
    rows = (
        rows
        * torch.logspace(0, -2, 24).double()
        @ torch.linalg.qr(torch.randn(24, 24, generator=generator).double())[0]
    )
    problem = Problem(layer, weight, rows.t() @ rows + 1e-6 * torch.eye(24).double())
    plain, right = factored(weight), problem.factored
    wrong = factored(weight, None, problem.inputs)
    lost = [problem.error(torch.matmul(*found.of_rank(8))) for found in (plain, right, wrong)]
    assert lost[1] < 0.3 * lost[0]
    assert lost[2] > 0.9 * lost[0]


@pytest.mark.parametrize("stored", ["linear", "matmul"])
def test_marginals_belong_to_their_axes(stored: str) -> None:
    graph, data = graph_and_data(stored)
    data[:, 5] *= 100
    ((inputs, outputs),) = gradient_metrics(graph, layers_in(graph), [(data,)], 0, "fwsvd").values()
    assert int(inputs[0].diagonal().argmax()) == 5
    assert outputs[0].diagonal()[:4].min() > 10 * outputs[0].diagonal()[-4:].max()


def network() -> tuple[Graph, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 8))
    data = torch.randn(64, 16)
    return capture(model.eval(), (data[:2],), dynamic={0: {0: "batch"}}), [data]


@pytest.mark.parametrize("rule", ["energy", "effective-rank", "welore", "fisher"])
@pytest.mark.parametrize("figure", ["params", "macs"])
def test_rules_meet_budgets(rule: str, figure: str) -> None:
    graph, data = network()
    small = regauge.optimize(graph, f"factorize{{{figure}=0.5,rule={rule}}}", data=data)
    before, after = figures(graph), figures(small)
    share = after.macs / before.macs if figure == "macs" else after.parameters / before.parameters
    assert 0.3 < share <= 0.5


def choices(rank: int, size: int) -> list[Choice]:
    found = [Choice("low-rank", (own,), own, own, 0.0) for own in range(1, rank)]
    return [Choice("", (), size, size, 0.0), *found]


def test_levels_of_rules() -> None:
    steep, flat = torch.logspace(0, -8, 10).double(), torch.ones(10).double()
    values = {"steep": steep, "flat": flat}
    energy = wanted_by("energy", values, {})
    assert (energy("steep", 0.9), energy("flat", 0.9)) == (2, 9)
    effective = wanted_by("effective-rank", values, {})
    assert effective("flat", 0.1) / effective("steep", 0.1) == pytest.approx(10 / 2.77, rel=0.02)  # of a ratio of 0.36
    threshold = wanted_by("welore", {"steep": steep, "flat": torch.linspace(1, 0, 10).double().square()}, {})
    assert threshold("steep", 0.5) == 1 and threshold("flat", 0.5) == float("inf")
    fisher = wanted_by("fisher", values, {"steep": torch.full((1, 2, 2), 4.0), "flat": torch.ones(1, 2, 2)})
    assert fisher("steep", 0.2) == pytest.approx(2 * fisher("flat", 0.2))
    picked = by_rule({"steep": choices(5, 10), "flat": choices(5, 10)}, {"parameters": 12}, energy)
    assert picked["steep"].ranks == (2,) and picked["flat"].ranks == ()


@pytest.mark.parametrize("text", ["params=0.5,rule=fisher", "params=0.5,metric=whitened"])
def test_what_needs_data_says_so(text: str) -> None:
    graph, _ = network()
    with pytest.raises(PassError, match="give batches"):
        regauge.optimize(graph, f"factorize{{{text}}}")


def in_few_directions() -> tuple[nn.Module, Graph, torch.Tensor]:
    """Two layers, of which the first is given 6 directions of 48."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40)).double().eval()
    data = torch.randn(256, 6).double() @ torch.randn(6, 48).double()
    return model, capture(model, (data[:2],), dynamic={0: {0: "batch"}}), data


def test_the_utilised_rank_of_a_layer_is_exact_on_data() -> None:
    """Weights of full rank whose outputs take 6 directions (and a mean): these are kept, and no others."""
    model, graph, data = in_few_directions()
    small = regauge.optimize(graph, "factorize{energy=0.9995,metric=whitened}", data=[data])
    assert small.parameters["0.down.weight"].shape[0] == 6
    with torch.no_grad():
        expected, found = model(data), small.to_torch()(data)
    assert ((found - expected).square().mean() / expected.square().mean()).item() < 1e-8
    plain = regauge.optimize(graph, "factorize{energy=0.9995}")
    assert {"0.weight", "2.weight"} <= set(plain.parameters)  # the weights alone have no few directions


@pytest.mark.parametrize("energy", [0.9, 0.99])
@pytest.mark.parametrize("with_data", [False, True])
def test_each_layer_keeps_the_energy_that_is_asked_for(energy: float, with_data: bool) -> None:
    """And with one direction less it would not."""
    torch.manual_seed(1)
    layer = nn.Linear(32, 48, bias=False).double()
    layer.weight = nn.Parameter(layer.weight @ torch.diag(torch.logspace(0, -3, 32).double()))
    data = torch.randn(200, 32).double()
    graph = capture(nn.Sequential(layer).eval(), (data[:2],), dynamic={0: {0: "batch"}})
    options = f"factorize{{energy={energy},metric={'whitened' if with_data else 'plain'}}}"
    small = regauge.optimize(graph, options, data=[data] if with_data else None)
    rank = small.parameters["0.down.weight"].shape[0]
    product = small.parameters["0.up.weight"].tensor @ small.parameters["0.down.weight"].tensor
    weighed = data if with_data else torch.eye(32).double()
    whole = (weighed @ layer.weight.t()).square().sum()
    lost = (weighed @ (layer.weight - product).t()).square().sum() / whole
    best = torch.linalg.svdvals(weighed @ layer.weight.t()).square() / whole
    assert lost <= 1 - energy + 1e-3
    assert best[rank - 1 :].sum() > 1 - energy - 1e-3


def test_convolutions_keep_it_in_whatever_form_costs_least() -> None:
    torch.manual_seed(2)
    conv = nn.Conv2d(16, 24, 3, padding=1)
    mixed = torch.einsum("op,pqhw,qi->oihw", torch.randn(24, 5), torch.randn(5, 4, 3, 3), torch.randn(4, 16))
    conv.weight = nn.Parameter(mixed)
    x = torch.randn(2, 16, 8, 8)
    graph = capture(nn.Sequential(conv).eval(), (x,), dynamic={0: {0: "batch"}})
    small = regauge.optimize(graph, "factorize{energy=0.99999}")
    assert str(small.report).count("(tucker)") == 1
    torch.testing.assert_close(small.to_torch()(x), conv(x), rtol=0, atol=0.1)
    assert figures(small).macs < 0.4 * figures(graph).macs


def test_energy_alone_is_asked_for() -> None:
    for options, said in [("energy=0.9,params=0.5", "not both"), ("energy=0.9,rank=2", "not both"), ("energy=2", "1")]:
        with pytest.raises(PassError, match=said):
            regauge.optimize(in_few_directions()[1], f"factorize{{{options}}}")
