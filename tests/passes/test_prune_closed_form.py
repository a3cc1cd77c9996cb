"""Channels that are kept take over what was removed, by weights alone; batch norms re-estimated on data."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from regauge.ir.dims.resize import resize
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.calibration.batch_norms import gain_of
from regauge.passes.calibration.channel_moments import ChannelMoments, ChannelReader
from regauge.passes.pruning.closed_form import CLOSED_FORMS, ClosedForm, take_over


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def captured(model: nn.Module, x: torch.Tensor) -> Graph:
    return regauge.capture(model.eval(), (x[:2],), dynamic={0: {0: "batch"}})


def error(graph: Graph, small: Graph, x: torch.Tensor) -> float:
    """The squared change of the outputs as a share of their variance."""
    y = graph.run(x)[0].double()
    return float((small.run(x)[0].double() - y).square().mean() / y.var())


@cache
def trained() -> tuple[nn.Module, torch.Tensor]:
    """A small network with batch norms that tells shifted prototypes apart, and images that it has not seen."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    prototypes = 2 * nn.functional.avg_pool2d(torch.randn(6, 3, 12, 12, generator=generator), 3, 1, 1)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    model = nn.Sequential(
        *block(3, 16), *block(16, 24), nn.MaxPool2d(2), *block(24, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 6),
    )  # fmt: skip
    adam = torch.optim.Adam(model.parameters(), 5e-3)

    def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(6, (count,), generator=generator)
        shifts = torch.randint(-2, 3, (count, 2), generator=generator).tolist()
        moved = [torch.roll(prototypes[c], tuple(shift), (1, 2)) for c, shift in zip(y.tolist(), shifts, strict=True)]
        return torch.stack(moved) + torch.randn(count, 3, 12, 12, generator=generator), y

    for _ in range(60):
        x, y = batch(48)
        adam.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        adam.step()
    return model.eval(), batch(256)[0]


def combined(first: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """The last four channels become combinations of the first four, whatever the batch norm does to them."""
    with torch.no_grad():
        norm.weight.copy_(torch.rand(8) + 0.5)
        norm.bias.copy_(torch.randn(8))
        norm.running_mean.copy_(torch.randn(8))
        norm.running_var.copy_(torch.rand(8) + 0.5)
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - gain * norm.running_mean
        shares = torch.randn(4, 4, dtype=first.weight.dtype)
        rows, offsets = first.weight * gain[:, None, None, None], gain * first.bias + shift
        first.weight[4:] = torch.einsum("ji,iabc->jabc", shares, rows[:4]) / gain[4:, None, None, None]
        norm.bias[4:] += shares @ offsets[:4] - (gain[4:] * first.bias[4:] + shift[4:])


def last_half_cut(graph: Graph, form: ClosedForm, ridge: float) -> tuple[Graph, Graph, int]:
    dim = next(group.dim for group in graph.groups() if group.free)
    keep = {dim: np.arange(4)}
    masked, small = resize(graph, keep), resize(graph, keep)
    done = take_over(graph, small, keep, form=form, by="test", ridge=ridge)
    assert not done.left
    return masked, small, done.layers


@pytest.mark.parametrize("between", [[], [nn.Dropout()], [nn.AvgPool2d(2)]])
def test_exact_combinations_are_taken_over_exactly(between: list[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *between, nn.Conv2d(8, 5, 3), nn.Conv2d(5, 3, 1))
    model = model.double().eval()
    combined(model[0], model[1])  # type: ignore[arg-type]
    x = images(4).double()
    graph = captured(model, x)
    masked, small, done = last_half_cut(graph, "udfc", 1e-13)
    assert done == 1 and error(graph, masked, x) > 0.1
    assert error(graph, small, x) < 1e-16


def test_a_sum_is_taken_over_where_all_its_addends_are_combinations() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.m = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.b, self.n = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.out = nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.out(self.m(self.a(x)) + self.n(self.b(x)))
            return result

    torch.manual_seed(0)
    model = Branches().double().eval()
    shares = torch.randn(4, 4, dtype=torch.float64)
    with torch.no_grad():  # the same combinations in both
        for conv in (model.a, model.b):
            conv.weight[4:] = torch.einsum("ji,iabc->jabc", shares, conv.weight[:4])
        model.a.bias[4:] = shares @ model.a.bias[:4]  # type: ignore[index]
    x = images(4).double()
    graph = captured(model, x)
    masked, small, done = last_half_cut(graph, "udfc", 1e-13)
    assert done == 1 and error(graph, masked, x) > 0.1
    assert error(graph, small, x) < 1e-16


@pytest.mark.parametrize(("ratio", "most"), [(0.15, 0.2), (0.4, 0.5)])
def test_moments_lower_the_error_of_a_trained_network(ratio: float, most: float) -> None:
    model, x = trained()
    graph = captured(model, x)
    masked, small = (
        regauge.optimize(graph, f"prune{{ratio={ratio},score=l2,compensate={form}}}") for form in ("false", "moments")
    )
    assert "by weights alone (moments): 3" in str(small.report)
    assert [p.shape for p in small.parameters.values()] == [p.shape for p in masked.parameters.values()]
    assert error(graph, small, x) < most * error(graph, masked, x)


def widened(model: nn.Module) -> nn.Module:
    """Every hidden channel twice, the second time a little different, each with half of the weight."""
    wide = copy.deepcopy(model)
    layers = [layer for layer in wide.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for layer in layers[1:]:
            layer.weight = nn.Parameter(torch.cat([layer.weight, layer.weight], 1) / 2)
        for layer in layers[:-1]:
            noisy = layer.weight * (1 + 0.1 * torch.randn_like(layer.weight))
            layer.weight = nn.Parameter(torch.cat([layer.weight, noisy]))
        for norm in (layer for layer in wide.modules() if isinstance(layer, nn.BatchNorm2d)):
            for name in ("weight", "bias"):
                setattr(norm, name, nn.Parameter(getattr(norm, name).repeat(2)))
            for name in ("running_mean", "running_var"):
                setattr(norm, name, getattr(norm, name).repeat(2))
    return wide


@pytest.mark.parametrize(("form", "most"), [("udfc", 0.8), ("moments", 0.2)])
def test_of_two_channels_that_are_nearly_alike_one_takes_over(form: str, most: float) -> None:
    model, x = trained()
    torch.manual_seed(0)
    graph = captured(widened(model), x)
    masked, small = (
        regauge.optimize(graph, f"prune{{ratio=0.1,score=l2,compensate={how}}}") for how in ("false", form)
    )
    assert error(graph, small, x) < most * error(graph, masked, x)


def test_moments_behind_an_activation_are_those_of_normal_inputs() -> None:
    """White inputs through a layer, a batch norm that knows their statistics, and relu: against a sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(200_000, 10)
    with torch.no_grad():
        y = model[0](x)
        model[1].running_mean.copy_(y.mean(0))  # type: ignore[operator]
        model[1].running_var.copy_(y.var(0))  # type: ignore[operator]
        model[1].bias.copy_(torch.randn(6))  # type: ignore[operator]
        hidden = model[:3](x).double()
    graph = captured(model, x)
    assert gain_of(next(node for node in graph.nodes if node.op == "batch_norm")).shape == (6,)
    dim = next(group.dim for group in graph.groups() if group.free)
    found = ChannelReader(graph, "moments", {}).of(graph.nodes[-1].inputs[0], dim)  # type: ignore[arg-type]
    assert not isinstance(found, str)
    torch.testing.assert_close(found.gram(), hidden.t() @ hidden / len(x), rtol=0.02, atol=0.01)


def behind(activation: nn.Module) -> tuple[nn.Sequential, ChannelMoments]:
    """White inputs, a layer of five channels, a batch norm that holds their statistics, an activation; its moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), activation, nn.Linear(5, 3)).double().eval()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    with torch.no_grad():
        model[0].weight[4] = -model[0].weight[0] + 0.1 * model[0].weight[1]  # type: ignore[operator, index]
        norm.eps = 0.0
        norm.running_var.copy_(model[0].weight.square().sum(1))  # type: ignore[operator, union-attr]
        norm.weight.copy_(torch.tensor([1, 2, 0.5, 3, 1]))
        norm.bias.copy_(torch.tensor([0, 0.5, -0.5, -3, 0]))
    graph = captured(model, torch.randn(2, 4).double())
    dim = next(group.dim for group in graph.groups() if group.free)
    found = ChannelReader(graph, "moments", {}).of(graph.nodes[-1].inputs[0], dim)  # type: ignore[arg-type]
    assert not isinstance(found, str)
    return model, found


def test_moments_behind_relu_are_those_of_rectified_normals() -> None:
    model, found = behind(nn.ReLU())
    norm, weight = model[1], model[0].weight.detach()
    mean, deviation = norm.bias.detach(), norm.weight.detach()  # type: ignore[operator]
    normal = torch.distributions.Normal(torch.zeros(1).double(), torch.ones(1).double())
    share, density = normal.cdf(mean / deviation), normal.log_prob(mean / deviation).exp()
    first = mean * share + deviation * density
    second = (mean.square() + deviation.square()) * share + mean * deviation * density
    torch.testing.assert_close(found.mean[0], first, rtol=0, atol=3e-4)
    torch.testing.assert_close(found.covariance[0].diagonal(), second - first.square(), rtol=1e-3, atol=0)
    # the two of mean 0 and deviation 1 have the closed form of the arc-cosine kernel
    cosine = (weight[0] @ weight[4]) / weight[0].norm() / weight[4].norm()
    product = (torch.sqrt(1 - cosine**2) + cosine * (torch.pi - torch.arccos(cosine))) / (2 * torch.pi)
    assert cosine < -0.9
    assert float(found.covariance[0, 0, 4]) == pytest.approx(float(product - first[0] * first[4]), abs=2e-3)


ACTIVATIONS = [
    nn.ReLU6(), nn.Hardtanh(-0.5, 1.5), nn.LeakyReLU(0.1), nn.ELU(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Mish(),
    nn.Hardsigmoid(), nn.Tanh(), nn.Softplus(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: type(activation).__name__)
def test_moments_behind_other_activations_are_those_of_a_sample(activation: nn.Module) -> None:
    model, found = behind(activation)
    with torch.no_grad():
        hidden = model[:3](torch.randn(300_000, 4, dtype=torch.float64))
    covariance, scale = torch.cov(hidden.t()), hidden.std(0)
    assert ((found.mean[0] - hidden.mean(0)) / scale).abs().max() < 0.01
    assert ((found.covariance[0] - covariance) / scale[:, None] / scale).abs().max() < 0.012


class Unsound(nn.Module):
    """A depthwise layer, a gate and a residual sum with the input, each behind a Dim of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.depthwise, self.narrow = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
        self.value, self.gate, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.narrow(self.depthwise(self.wide(x))).mean((2, 3))
        result: torch.Tensor = self.out(self.value(pooled) * self.gate(pooled).sigmoid())
        return result


@pytest.mark.parametrize("form", CLOSED_FORMS)
def test_what_mixes_or_weighs_channels_is_left_and_counted(form: str) -> None:
    torch.manual_seed(0)
    x = images(4).double()
    graph = captured(Unsound().double(), x)
    small = regauge.optimize(graph, f"prune{{ratio=0.5,compensate={form}}}")
    masked = regauge.optimize(graph, "prune{ratio=0.5,compensate=false}")
    left = small.report.passes[0].left
    reason = "no layer takes over from its kept indices: "
    assert left[reason + "a grouped layer stands between"] == 1
    assert left[reason + "mul stands between"] == 1
    assert "by weights alone" in str(small.report)
    lost = {cut.dim: cut.lost for cut in small.report.passes[0].cuts}
    assert lost["wide.weight:0"] == ("a grouped layer stands between",)
    assert lost["value.weight:0"] == ("mul stands between",) and not lost["narrow.weight:0"]
    changed = [n for n, p in small.parameters.items() if not torch.equal(p.tensor, masked.parameters[n].tensor)]
    assert set(changed) <= {"value.weight", "gate.weight"}, "only what reads the narrow layer alone"


def test_statistics_taken_anew_lower_the_error_of_a_masked_network() -> None:
    model, x = trained()
    graph = captured(model, x)
    masked, anew = (
        regauge.optimize(graph, f"prune{{ratio=0.4,score=l2,compensate=false,reestimate={flag}}}", data=[(x[:128],)])
        for flag in ("false", "true")
    )
    assert "batch norms with statistics of 128 examples: 2" in str(anew.report)
    assert error(graph, anew, x[128:]) < 0.7 * error(graph, masked, x[128:])
    first, second = (f"{place}.running_mean" for place in (1, 4))
    assert torch.isin(anew.parameters[first].tensor, graph.parameters[first].tensor).all(), "nothing before it is cut"
    assert not torch.isin(anew.parameters[second].tensor, graph.parameters[second].tensor).any()


def test_options_that_contradict_each_other_are_refused() -> None:
    graph = captured(trained()[0], images(2))
    with pytest.raises(PassError, match="preserve or reestimate, not both"):
        regauge.optimize(graph, "prune{ratio=0.5,preserve=true,reestimate=true}")
    with pytest.raises(PassError, match="true or false or one of udfc, moments"):
        regauge.optimize(graph, "prune{ratio=0.5,compensate=maybe}")
