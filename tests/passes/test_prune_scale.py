"""``prune`` with data where memory is short: mapped files, scarce rows, Dims that are taken apart in part."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.cost import figures
from regauge.ir.graph import Graph
from regauge.ir.running import lockstep
from regauge.ir.storage.weights import CutWeight, DenseWeight, file_of
from regauge.passes.calibration.layers import layer_of
from regauge.passes.calibration.moments import Halves, Moments, inverse, least_squares
from regauge.passes.calibration.probe import Probe
from regauge.passes.pruning import distortion, surgeon
from regauge.passes.pruning.selection import best
from regauge.passes.pruning.surgeon import Share, taken_apart


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 12), nn.GELU(), nn.Linear(12, 5)).eval()


def in_file(model: nn.Module, path: Path) -> nn.Module:
    """The model with its parameters in a mapped file."""
    count = sum(parameter.numel() for parameter in model.parameters())
    flat, offset = torch.from_file(str(path), shared=True, size=count), 0
    for name, parameter in list(model.named_parameters()):
        own = flat[offset : offset + parameter.numel()].view(parameter.shape)
        own.copy_(parameter.detach())
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], nn.Parameter(own, False))
        offset += parameter.numel()
    return model


def test_weights_of_a_mapped_model_stay_in_files(tmp_path: Path) -> None:
    x = rows(200, 12)
    graph = capture(in_file(perceptron(), tmp_path / "weights"), (x,))
    pruned = regauge.optimize(graph, "prune{ratio=0.4}", data=[(x,)])
    weights = {name: parameter.weight for name, parameter in pruned.parameters.items()}
    assert isinstance(weights["0.weight"], CutWeight)  # nothing to refit in it: it is cut when it is read
    for name in ("2.weight", "4.weight"):
        assert isinstance(weights[name], DenseWeight) and file_of(weights[name].load()) is not None, name
    in_memory = regauge.optimize(capture(perceptron(), (x,)), "prune{ratio=0.4}", data=[(x,)])
    torch.testing.assert_close(pruned.run(x)[0], in_memory.run(x)[0])
    torch.testing.assert_close(pruned.to_torch()(x), in_memory.run(x)[0])


def test_values_that_do_not_fit_are_held_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(200, 12)
    expected = regauge.optimize(capture(perceptron(), (x,)), "prune{ratio=0.4}", data=[(x,)]).run(x)[0]
    monkeypatch.setattr(lockstep, "HELD", 0)
    monkeypatch.setattr(lockstep, "_SMALL", 1)
    graph = capture(perceptron(), (x,))
    torch.testing.assert_close(regauge.optimize(graph, "prune{ratio=0.4}", data=[(x,)]).run(x)[0], expected)


def test_scarce_rows_are_solved_in_their_dual_form() -> None:
    x, y, before = rows(20, 30), rows(20, 4, seed=1), rows(4, 31, seed=2).double()
    scarce, summed = Moments(30, 4), Moments(30, 4)
    for found in (scarce, summed):
        found.add(x[:12], y[:12])
        found.add(x[12:], y[12:])
    assert scarce.scarce and len(summed.gram) == 31 and not summed.scarce
    torch.testing.assert_close(inverse(scarce, 0.1), inverse(summed, 0.1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scarce.means(), summed.means())
    for bias in (True, False):
        one, other = (least_squares(found, before, 0.1, bias=bias) for found in (scarce, summed))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        error = float((y - x @ one[:, :-1].float().t() - one[:, -1].float()).square().sum())
        for found in (scarce, summed):
            assert found.error(one[:, :-1], one[:, -1]) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("sizes", [[9], [4, 5], [3, 3, 3, 40]])
def test_halves_share_out_the_rows(sizes: list[int]) -> None:
    halves, whole = Halves(10, 2), Moments(10, 2)
    for seed, count in enumerate(sizes):
        x, y = rows(count, 10, seed=seed), rows(count, 2, seed=10 + seed)
        halves.add(x, y)
        whole.add(x, y)
    assert halves.rows == sum(sizes) and min(part.rows for part in halves.parts) > 0
    torch.testing.assert_close(halves.together().gram, whole.gram, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moment", [1, 3])
def test_no_rows_and_equal_rows_blow_nothing_up(moment: int) -> None:
    found = Moments(6, 2)
    found.add(torch.ones(moment, 6) * 1e4, torch.ones(moment, 2))
    before = rows(2, 7).double()
    assert bool(inverse(found, 1e-2).isfinite().all())
    assert bool(least_squares(found, before, 1e-2, bias=True).isfinite().all())
    assert bool(least_squares(Moments(6, 2), before, 1e-2, bias=True).isfinite().all())


# -- taking a Dim apart ------------------------------------------------------------------------------------------------


def wide_layer(count: int = 400) -> tuple[Graph, Share, torch.Tensor, torch.Tensor]:
    """A layer behind a hidden width of 256 units, many of which others can stand in for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    x = rows(count, 24)
    graph = capture(model, (x,))
    layer = layer_of(graph.nodes[-1])
    assert layer is not None
    (dim,) = [group.dim for group in graph.groups() if group.free]
    hidden = torch.relu(model[0](x)).detach()
    moments = Moments(256)
    moments.add(hidden)
    share = Share.of(graph, dim, [layer], {layer: torch.ones(1, 64, dtype=torch.float64)}, 0, moments)
    return graph, share, hidden, model[2].weight.detach()


def loss(hidden: torch.Tensor, weight: torch.Tensor, scores: np.ndarray, goes: int) -> float:
    """The share of the output's square that is lost when the cheapest units go and the rest is refitted."""
    gone = torch.from_numpy(np.argsort(scores)[:goes].copy())
    kept = torch.ones(256, dtype=torch.bool)
    kept[gone] = False
    found, y = Moments(int(kept.sum()), 64), hidden @ weight.t()
    found.add(hidden[:, kept], y)
    before = torch.cat([weight[:, kept], torch.zeros(64, 1)], 1).double()
    solved = least_squares(found, before, 1e-2, bias=True)
    return found.error(solved[:, :-1], solved[:, -1]) / float((y - y.mean(0)).square().sum())


def test_few_large_steps_lose_little_against_one_index_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, share, hidden, weight = wide_layer()
    scores, _ = taken_apart([share], 256, None)
    losses = {"24 steps": loss(hidden, weight, scores, 96)}
    monkeypatch.setattr(surgeon, "_STEPS", 256)
    losses["one at a time"] = loss(hidden, weight, taken_apart([share], 256, None)[0], 96)
    monkeypatch.setattr(surgeon, "_STEPS", 24)
    monkeypatch.setattr(surgeon, "MEMORY", share.bytes(256) // 3)
    losses["in part"] = loss(hidden, weight, taken_apart([share], 256, None)[0], 96)
    alone = share.costs_alone(share.inverse()).numpy()
    losses["each alone"] = loss(hidden, weight, alone, 96)
    assert losses["24 steps"] < 1.05 * losses["one at a time"], losses
    assert losses["in part"] < 1.15 * losses["one at a time"], losses
    assert losses["in part"] < losses["each alone"], losses


def test_scores_rise_in_the_order_in_which_indices_go() -> None:
    _, share, _, _ = wide_layer(40)
    scores, factor = taken_apart([share], 256, None)
    assert factor == 1.0 and np.isfinite(scores).all() and (scores > 0).all()


def test_a_part_stays_as_it_is_when_its_near_columns_are_taken_out() -> None:
    _, share, _, _ = wide_layer()
    whole = share.inverse()
    part = share.part(torch.arange(256), whole.copy())
    costs = part.costs(torch.arange(256))
    part.near(torch.arange(256)).remove(torch.tensor([0, 7]))
    torch.testing.assert_close(part.costs(torch.arange(256)), costs, rtol=0, atol=0)
    for gone in range(200):  # in place, and anew where much is gone
        part.remove(torch.tensor([gone]))
    assert len(part.inverse) == len(part.weights) < 72
    left = torch.arange(200, 256)
    removal = whole.removal(torch.arange(200), left)
    weights = removal.made_up(share.part(torch.arange(256), whole).weights.t())
    hessian = torch.linalg.inv(whole.matrix_at(torch.arange(256)).matrix)[left][:, left]
    torch.testing.assert_close(part.costs(left), weights.square().sum(0) / torch.linalg.inv(hessian).diagonal())


def test_the_search_ends_when_the_lowest_scores_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    _, share, _, _ = wide_layer()
    taken: list[int] = []
    remove = surgeon.Part.remove

    def counted(part: surgeon.Part, gone: torch.Tensor) -> None:
        taken.append(len(gone))
        remove(part, gone)

    monkeypatch.setattr(surgeon.Part, "remove", counted)
    whole, _ = taken_apart([share], 256, None)
    every = sum(taken)
    for enough in (1, 60, 255):
        taken.clear()
        found, _ = taken_apart([share], 256, None, enough=enough)
        np.testing.assert_array_equal(best(found, 256 - enough), best(whole, 256 - enough))
        assert sum(taken) < every * (enough + 30) / 256


def test_scores_for_counts_that_are_known_say_the_same_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 100), nn.ReLU(), nn.Linear(100, 8)).eval()
    x = rows(200, 24)
    graph = capture(model, (x,))
    groups = [group for group in graph.groups() if group.free]
    whole = distortion.distortion_scores(graph, groups, [(x,)])
    monkeypatch.setattr(Probe, "change", None)
    found = distortion.distortion_scores(graph, groups, [(x,)], counts={group.dim: 30 for group in groups})
    for dim, scores in found.items():
        np.testing.assert_array_equal(best(scores, 30), best(whole[dim], 30))


def test_of_large_models_two_dims_of_a_kind_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(part for _ in range(5) for part in (nn.Linear(32, 32), nn.GELU())), nn.Linear(32, 32)
    ).eval()
    x = rows(200, 32)
    graph = capture(model, (x,))
    runs: list[int] = []
    change = Probe.change

    def counted(probe: Probe, weights: dict[str, torch.Tensor]) -> float:
        runs.append(len(weights))
        return change(probe, weights=weights)

    monkeypatch.setattr(Probe, "change", counted)
    groups = [group for group in graph.groups() if group.free]
    every = distortion.distortion_scores(graph, groups, [(x,)])
    assert len(runs) == 2 * len(groups) == 10
    monkeypatch.setattr(distortion, "_READ", figures(graph).bytes)
    runs.clear()
    some = distortion.distortion_scores(graph, groups, [(x,)])
    assert len(runs) == 4
    for dim, scores in some.items():  # the same order at another scale
        np.testing.assert_array_equal(np.argsort(scores), np.argsort(every[dim]))
        assert 1 / 3 < float((scores / every[dim]).mean()) < 3
