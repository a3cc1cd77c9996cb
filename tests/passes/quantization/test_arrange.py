"""``arrange``: the same function, and less lost where neighbouring channels share a scale."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import regauge
from random_networks import networks
from regauge.ir.graph import Graph
from regauge.passes.quantization.grid import Form, Grid
from rounded_networks import relative


def hidden() -> tuple[Graph, torch.Tensor]:
    """A hidden layer whose channels are up to a hundred times apart, in no order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    with torch.no_grad():
        for reader, writer in ((model[2], model[0]), (model[4], model[2])):
            size = 10 ** (2 * torch.rand(64))
            reader.weight.mul_(size)
            writer.weight.div_(size[:, None])
    x = torch.randn(64, 16)
    return regauge.capture(model, (x,)), x


def error_in_groups(graph: Graph) -> float:
    """Of the last layer's weight in 3 bits, with a scale for each 8 columns: noise over signal."""
    weight = graph.parameters["4.weight"].tensor.double()
    apart = Form(Grid(3), 8).rounded(weight).values - weight
    return float((apart / weight.abs().mean(0)).square().mean())


def test_groups_of_a_size_lose_less() -> None:
    """A tenth of the error of each column, as a share of its size."""
    graph, x = hidden()
    found = regauge.optimize(graph, "arrange")
    assert relative(graph, found, (x,)) < 1e-5
    columns = found.parameters["4.weight"].tensor.square().mean(0)
    assert bool((columns.diff() <= 0).all())
    assert error_in_groups(found) < 0.2 * error_in_groups(graph)


def test_channels_in_order_of_what_they_are_on_data() -> None:
    graph, x = hidden()
    found = regauge.optimize(graph, "arrange{activations=true}", data=[x])
    assert relative(graph, found, (x,)) < 1e-5
    seen: list[torch.Tensor] = []
    found.run((x,), hook=lambda node, results: seen.append(results[0]) if node.op == "relu" else None)  # type: ignore[func-returns-value]
    assert all(bool((values.double().square().mean(0).diff() <= 1e-12).all()) for values in seen)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(networks())
def test_random_networks_stay_the_same(graph: Graph) -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found = regauge.optimize(graph, "arrange")
    for a, b in zip(graph.run((x,)), found.run((x,)), strict=True):
        assert float((a - b).abs().max()) <= 1e-9 * max(1e-12, float(a.abs().max()))


@pytest.mark.parametrize("activations", [False, True])
def test_queries_and_keys(activations: bool) -> None:
    """Their head size is ordered by the rows that write it; both take the order."""
    torch.manual_seed(0)

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    x = torch.randn(2, 5, 16)
    graph = regauge.capture(Heads(), (x,))
    found = regauge.optimize(graph, f"arrange{{activations={str(activations).lower()}}}", data=[x])
    assert relative(graph, found, (x,)) < 1e-5
    assert not torch.equal(found.parameters["k.weight"].tensor, graph.parameters["k.weight"].tensor)
