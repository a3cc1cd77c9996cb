"""Gradual magnitude pruning: the schedule by hand, exact sparsity, and the finished graph."""

import numpy as np
import pytest
import torch

import regauge
from digits_training import accuracy, captured, convolutional, greatest_difference, train
from regauge.ir.cost import figures
from regauge.passes.training.schedules import cubic, decayed
from regauge.training import GradualGroups, GradualWeights, Target


def test_cubic_schedule_by_hand() -> None:
    assert [cubic(t) for t in (0, 0.25, 0.5, 1, 2)] == [0, 1 - 0.75**3, 0.875, 1, 1]


def test_decays_by_hand() -> None:
    assert [decayed(t, "linear") for t in (0, 0.25, 1)] == [1, 0.75, 0]
    assert decayed(0.5, "exponential") == pytest.approx(0.1)
    assert decayed(1, "exponential") == 0


def test_groups_follow_the_schedule_and_the_cut_network_is_the_masked_one() -> None:
    model = convolutional()
    graph = captured(model)
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    sparsifier = GradualGroups(model, graph, Target(ratio=0.5), begin=10, every=10, updates=4)
    reached = []
    train(model, 100, sparsifier, after=lambda: reached.append(sparsifier.sparsity))
    sizes = (16, 32, 32)
    for update in range(5):
        gone = 0.5 * cubic(update / 4)
        expected = 1 - sum(int((1 - gone) * size + 0.5) for size in sizes) / sum(sizes)
        assert reached[9 + 10 * update] == pytest.approx(expected)
    assert sparsifier.sparsity == 0.5
    masked = [int((w == 0).flatten(1).all(1).sum()) for w in (model[0].weight, model[3].weight, model[6].weight)]
    assert masked == [8, 16, 16]
    small = sparsifier.finish()
    assert greatest_difference(model, small.to_torch()) < 1e-5
    assert figures(small).macs < 0.3 * figures(graph).macs
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
    assert accuracy(model) > 0.85


@pytest.mark.parametrize("budget", ["macs", "params"])
def test_budget_is_met(budget: str) -> None:
    model = convolutional()
    graph = captured(model)
    sparsifier = GradualGroups(model, graph, Target(**{budget: 0.5}, scope="global"), every=5, updates=3)
    train(model, 16, sparsifier)
    small, whole = figures(sparsifier.finish()), figures(graph)
    figure = "macs" if budget == "macs" else "parameters"
    assert 0.45 * getattr(whole, figure) < getattr(small, figure) <= 0.5 * getattr(whole, figure)


def test_single_weights_reach_the_sparsity_exactly() -> None:
    model = convolutional()
    sparsifier = GradualWeights(model, captured(model), 0.75, every=10, updates=4)
    train(model, 100, sparsifier)
    for layer in (model[3], model[6], model[8]):
        assert int((layer.weight == 0).sum()) == layer.weight.numel() * 3 // 4
    assert bool((model[3].bias != 0).all())
    assert greatest_difference(model, sparsifier.finish().to_torch()) < 1e-5
    assert accuracy(model) > 0.85


def test_pattern_of_two_in_four_along_the_contracted_axis() -> None:
    model = convolutional()
    sparsifier = GradualWeights(model, captured(model), pattern=(2, 4), every=10, updates=3)
    assert sparsifier.left == {}  # the first convolution contracts one channel, which is no axis to make sparse
    train(model, 60, sparsifier)
    kernel = model[3].weight.movedim(1, -1).reshape(-1, 4)
    assert bool(((kernel != 0).sum(1) == 2).all())
    assert bool(((model[8].weight.reshape(-1, 4) != 0).sum(1) == 2).all())


def test_exact_training_goes_on_from_a_checkpoint() -> None:
    def fresh() -> tuple[torch.nn.Module, GradualGroups, torch.optim.Optimizer]:
        model = convolutional()
        return (
            model,
            GradualGroups(model, captured(model), Target(ratio=0.5), every=4, updates=5),
            torch.optim.Adam(model.parameters(), lr=3e-3),
        )

    model, sparsifier, optimizer = fresh()
    train(model, 12, sparsifier, optimizer=optimizer)
    saved = [part.state_dict() for part in (model, sparsifier, optimizer)]
    saved = [torch.load(_written(part), weights_only=True) for part in saved]
    train(model, 12, sparsifier, optimizer=optimizer, seed=1)
    again, resumed, other = fresh()
    for part, state in zip((again, resumed, other), saved, strict=True):
        part.load_state_dict(state)
    train(again, 12, resumed, optimizer=other, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(sparsifier.alive.values(), resumed.alive.values(), strict=True))


def _written(state: object) -> object:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_errors_say_what_to_do() -> None:
    model = convolutional()
    graph = captured(model)
    with pytest.raises(regauge.RegaugeError, match="exactly one of ratio"):
        Target(ratio=0.5, macs=0.5)
    with pytest.raises(regauge.RegaugeError, match="reaches its target at step 1000 and is at 0"):
        GradualGroups(model, graph, Target(ratio=0.5)).finish()
    with pytest.raises(regauge.RegaugeError, match="capture the graph from this model"):
        GradualGroups(torch.nn.Sequential(torch.nn.Linear(2, 3)), graph, Target(ratio=0.5))
    with pytest.raises(regauge.RegaugeError, match="cannot be met"):
        GradualGroups(model, graph, Target(macs=0.0001))


def test_dims_that_something_normalises_over_are_left_alone() -> None:
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 32), torch.nn.ReLU(),
        torch.nn.Linear(32, 10),
    )  # fmt: skip
    graph = captured(model)
    sparsifier = GradualGroups(model, graph, Target(ratio=0.5), every=1, updates=1)
    assert [dim.name for dim in sparsifier.dims] == ["3.weight:0"]
    assert sparsifier.left["something normalises or averages over it: normalised=True takes it too"] == 1
    train(model, 2, sparsifier)
    assert greatest_difference(model, sparsifier.finish().to_torch()) < 1e-5
