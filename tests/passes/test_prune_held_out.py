"""``prune`` by few examples: refits and cuts are judged by examples that they were not made from."""

from functools import cache

import pytest
import torch
from torch import nn

import regauge
from digits_training import captured, digits, train
from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph
from regauge.passes.calibration import probe
from regauge.passes.calibration.batches import in_folds
from regauge.passes.pruning.held_out import Attempt, judge


@cache
def classifier() -> Graph:
    """A trained network whose outputs saturate, behind a maximum over places."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.GELU(), nn.Conv2d(24, 32, 3), nn.GELU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 10),
    )  # fmt: skip
    train(model, 200)
    return captured(nn.Sequential(model, nn.Softmax(1)).eval())


@cache
def without_data() -> Graph:
    return regauge.optimize(classifier(), "prune{macs=0.5}")


def change(pruned: Graph) -> float:
    """Of the probabilities, on images that nothing saw."""
    images = digits()[2]
    (y,), (z,) = classifier().run(images), pruned.run(images)
    return float((z - y).square().sum(1).mean())


@pytest.mark.parametrize(("count", "seed"), [(8, 0), (8, 1), (16, 1), (32, 1)])
def test_few_examples_are_never_worse_than_none(count: int, seed: int) -> None:
    drawn = torch.randperm(1200, generator=torch.Generator().manual_seed(seed))[:count]
    batches = [(part,) for part in digits()[0][drawn].split(count // 4)]
    assert change(regauge.optimize(classifier(), "prune{macs=0.5}", data=batches)) <= change(without_data())


def line(*weights: float) -> Graph:
    """y = w x, with weights that are numbers."""
    graph = regauge.capture(nn.Linear(1, 1, bias=False), (torch.ones(2, 1),), dynamic={0: {0: "batch"}})
    (weight,) = graph.all_parameters()
    set_weight(graph, weight, torch.tensor([weights]))
    return graph


@pytest.mark.parametrize(("refit", "share"), [(1.0, 1.0), (2.0, 0.5), (4.0, 0.25), (-1.0, 0.0)])
def test_the_share_of_refits_is_the_one_that_changes_the_outputs_least(refit: float, share: float) -> None:
    attempt = Attempt(line(0.0), line(refit), {})
    found = judge(line(1.0), attempt, [(torch.ones(8, 1),)], lambda part: attempt)
    assert found is not None and found.share == share
    assert found.change == pytest.approx(0.0 if share else 1.0)


def test_each_part_is_judged_by_an_attempt_without_it() -> None:
    batches, seen = [(torch.full((2, 1), float(n)),) for n in range(6)], list[set[float]]()

    def again(part: list[tuple[torch.Tensor]]) -> Attempt:
        seen.append({float(batch[0][0]) for batch in part})
        return Attempt(line(0.0), line(1.0), {})

    judge(line(1.0), Attempt(line(0.0), line(1.0), {}), batches, again)
    assert seen == [{1, 2, 3, 5}, {0, 2, 3, 4}, {0, 1, 3, 4, 5}, {0, 1, 2, 4, 5}]


def test_refits_that_clearly_help_many_examples_are_not_judged() -> None:
    attempt, batches = Attempt(line(0.0), line(0.9), {}), [(torch.ones(256, 1),)]
    assert judge(line(1.0), attempt, batches, lambda part: pytest.fail("tried again")) is None


def test_examples_of_one_batch_are_dealt_out_where_their_number_is_free() -> None:
    batch = {"x": torch.arange(5), "scale": torch.ones(2)}
    free, fixed = line(1.0), regauge.capture(nn.Linear(1, 1), (torch.ones(5, 1),))
    folds = in_folds(free, [batch], 4)
    assert folds is not None and [part["x"].tolist() for (part,) in folds] == [[0], [1], [2], [3, 4]]
    assert all(part["scale"] is batch["scale"] for (part,) in folds)
    assert in_folds(fixed, [batch], 4) is None
    assert in_folds(fixed, [batch] * 3, 4) == [[batch]] * 3


def test_refits_that_are_asked_for_are_taken_as_they_are() -> None:
    batches = [(digits()[0][:8],)]
    judged, asked = (
        str(regauge.optimize(classifier(), f"prune{{macs=0.5,score=l2{option}}}", data=batches).report)
        for option in ("", ",compensate=true")
    )
    assert "on examples not seen it was best to take" in judged and "not seen" not in asked


def test_outputs_that_do_not_fit_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "HELD", 48)
    batches = [(torch.full((8, 1), float(n)),) for n in range(3)]
    found = probe.Probe(line(1.0), batches)
    assert found.change(graph=line(3.0)) == pytest.approx(4 * (0 + 1 + 4) / 3)
    assert (found.rows, len(found._held)) == (24, 1)
