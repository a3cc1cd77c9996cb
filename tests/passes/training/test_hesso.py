"""HESSO and CRIC: saliency and decay by hand, exact zeros that stay, and the finished graph."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from digits_training import accuracy, captured, convolutional, greatest_difference, train
from regauge.ir.cost import figures
from regauge.training import Cric, Hesso, Target


def perceptron() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def backward(model: nn.Module) -> None:
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(2))).square().sum().backward()


def test_saliency_is_the_mean_of_five_unit_vectors() -> None:
    model = perceptron()
    sparsifier = Hesso(model, regauge.capture(model, (torch.zeros(2, 3),)), Target(ratio=0.5))
    backward(model)
    x = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    g = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
    size, dot = x.norm(dim=1), (x * g).sum(1)
    measures = [size, size / 4, 1 + dot / size / g.norm(dim=1), dot.abs(), dot.square() / 2]
    expected = sum(measure / measure.norm() for measure in measures) / 5
    (found,) = sparsifier.saliency().values()
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)


def test_redundant_slices_fall_linearly_to_exact_zero_and_stay_there() -> None:
    model = perceptron()
    sparsifier = Hesso(
        model, regauge.capture(model, (torch.zeros(2, 3),)), Target(ratio=0.5), warmup=1, periods=1, period_steps=4
    )
    start = model[0].weight.detach().clone()
    norms = []
    for _ in range(7):
        backward(model)  # gradients for the saliency; no optimizer, so that only the decay shows
        sparsifier.step()
        norms.append(model[0].weight.detach().norm(dim=1) / start.norm(dim=1))
    dead = ~next(iter(sparsifier.alive.values()))
    assert dead.sum() == 2
    shares = [1, 0.75, 0.5, 0.25, 0, 0, 0]
    for norm, share in zip(norms, shares, strict=True):
        assert norm[dead].tolist() == pytest.approx([share] * 2)
        assert norm[~dead].tolist() == pytest.approx([1, 1])
    assert not model[2].weight[:, dead].any()
    report = sparsifier.finish().report
    assert "0.weight:0: 4 -> 2" in str(report) and report.before.parameters == 26 and report.after.parameters == 14


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_half_of_the_macs_on_digits(kind: str) -> None:
    model = convolutional()
    graph = captured(model)
    sparsifier = Hesso(model, graph, Target(macs=0.5), warmup=40, periods=4, period_steps=15)
    rate = {"sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, lr=3e-3)}
    train(model, 200, sparsifier, optimizer=rate[kind](model.parameters()))
    for dim, alive in sparsifier.alive.items():
        for member in sparsifier._members[dim]:
            tensor = model.get_parameter(member.parameter.name).detach().movedim(member.axis, 0)
            if tensor.shape[0] == len(alive):
                assert not tensor[~alive].any()
    small = sparsifier.finish()
    assert 0.49 * figures(graph).macs < figures(small).macs <= 0.5 * figures(graph).macs
    assert greatest_difference(model, small.to_torch()) < 1e-4
    assert accuracy(model) > 0.9


def test_counts_are_rounded_where_asked() -> None:
    model = convolutional()
    sparsifier = Hesso(model, captured(model), Target(ratio=0.4, round_to=8), periods=2, period_steps=3)
    train(model, 7, sparsifier)
    assert all(int(alive.sum()) % 8 == 0 for alive in sparsifier.alive.values())


def test_checkpoint_in_the_middle_of_a_decay() -> None:
    def fresh() -> tuple[nn.Module, Hesso, torch.optim.Optimizer]:
        model = convolutional()
        sparsifier = Hesso(model, captured(model), Target(ratio=0.5), warmup=2, periods=2, period_steps=10)
        return model, sparsifier, torch.optim.Adam(model.parameters())

    model, sparsifier, optimizer = fresh()
    train(model, 17, sparsifier, optimizer=optimizer)
    saved = [copy.deepcopy(part.state_dict()) for part in (model, sparsifier, optimizer)]
    train(model, 10, sparsifier, optimizer=optimizer, seed=1)
    again, resumed, other = fresh()
    for part, state in zip((again, resumed, other), saved, strict=True):
        part.load_state_dict(state)
    train(again, 10, resumed, optimizer=other, seed=1)
    assert resumed.sparsity == sparsifier.sparsity == pytest.approx(0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_gradients_are_asked_for() -> None:
    model = perceptron()
    sparsifier = Hesso(model, regauge.capture(model, (torch.zeros(2, 3),)), Target(ratio=0.5))
    with pytest.raises(regauge.RegaugeError, match="before zero_grad"):
        sparsifier.step()


def test_cric_puts_weights_back_after_each_cycle_and_ends_at_the_target() -> None:
    model = convolutional()
    graph = captured(model)
    sparsifier = Cric(model, graph, Target(macs=0.5), warmup=30, period_steps=30, sampling_steps=5, cycles=4)
    train(model, 31, sparsifier)
    before = {p.name: t for p, t in sparsifier._before.items()}
    violating = {dim: goes.copy() for dim, goes in sparsifier.redundant.items()}
    assert sum(goes.sum() for goes in violating.values()) > 0
    train(model, 4, sparsifier, seed=1)
    assert sparsifier.cycle == 1
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in before.items())
    tested_again = [(sparsifier.redundant[dim] & goes).any() for dim, goes in violating.items()]
    assert not any(tested_again)
    train(model, 90, sparsifier, seed=2)
    assert sparsifier.cycle <= 4 and sparsifier.steps > sparsifier.last_step
    small = sparsifier.finish()
    assert figures(small).macs <= 0.5 * figures(graph).macs
    assert greatest_difference(model, small.to_torch()) < 1e-4
    assert accuracy(model) > 0.85


def test_cric_tests_what_was_lowest_at_any_step_of_a_cycle() -> None:
    model = perceptron()
    sparsifier = Cric(
        model, regauge.capture(model, (torch.zeros(2, 3),)), Target(ratio=0.5), sampling_steps=2, cycles=3, tolerance=0
    )
    (dim,) = sparsifier.dims
    given = iter([[1, 2, 3, 4], [1, 9, 2, 3], [4, 3, 2, 1], [4, 3, 2, 1]])
    sparsifier.saliency = lambda: {dim: np.array(next(given), dtype=float)}  # type: ignore[method-assign]
    for _ in range(2):
        sparsifier.step()
    assert sparsifier.redundant[dim].tolist() == [False, False, True, False]  # the third was lowest at the second step
    for _ in range(2):
        sparsifier.step()
    assert sparsifier.redundant[dim].tolist() == [False, False, False, True]  # the first two and the third were tested
    assert sparsifier.scores()[dim].tolist() == [2.5, 4.25, 2.25, 2.25]


def test_cric_adds_the_loss_ratios_of_projected_dims_by_hand() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(3))
    graph = regauge.capture(model.eval(), (x,))
    model.train()

    def loss() -> torch.Tensor:
        return model(x).square().mean()

    sparsifier = Cric(model, graph, Target(ratio=0.5), sampling_steps=4, measure_loss=loss)
    loss().backward()
    before = copy.deepcopy(model.state_dict())
    saliency, makers = sparsifier.saliency(), {4: (0, 1), 8: (3,)}
    expected = {}
    for dim, values in saliency.items():
        whole, ratios = loss().item(), []
        for count in (len(values) // 4, len(values) // 2, 3 * len(values) // 4):
            lowest = np.argsort(values)[:count]
            with torch.no_grad():
                for place in makers[len(values)]:
                    model[place].weight[lowest] = 0
                    model[place].bias[lowest] = 0
            ratios.append(loss().item() / whole)
            model.load_state_dict(before)
        expected[dim] = sum(ratios) / 3 / len(values)
    sparsifier.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "running" in name or "batches" in name)
    for dim, values in saliency.items():
        np.testing.assert_allclose(sparsifier.scores()[dim], values + expected[dim], rtol=1e-4)


def test_cric_keeps_more_of_a_dim_without_which_the_loss_rises() -> None:
    """Two hidden layers alike but for their effect: the second one's outputs hardly count beside a shortcut."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 16), nn.Linear(3, 16)
            self.c, self.d = nn.Linear(16, 2), nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.c(self.a(x).relu()) + 1e-3 * self.d(self.b(x).relu())
            return found

    torch.manual_seed(0)
    model = Branch()
    x = torch.randn(64, 3)
    y = model(x).detach() + 0.01
    graph, kept = regauge.capture(model, (x,)), {}
    for measured in (False, True):
        own = copy.deepcopy(model)

        def loss(own: nn.Module = own) -> torch.Tensor:
            return (own(x) - y).square().mean()

        sparsifier = Cric(
            own, graph, Target(ratio=0.5), sampling_steps=2, cycles=1, period_steps=1,
            measure_loss=loss if measured else None,
        )  # fmt: skip
        for _ in range(3):
            loss().backward()
            sparsifier.step()
        kept[measured] = next(int(a.sum()) for d, a in sparsifier.alive.items() if d.name.startswith("a."))
    assert kept[True] > kept[False]
