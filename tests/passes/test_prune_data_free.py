"""``prune`` without data: inputs made up from the statistics of batch norms, or noise, and what is left as it was."""

import pytest
import torch
from torch import nn

import regauge
from regauge.frontends.capture import capture
from regauge.ir.edit import Builder
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.calibration.generated import generated_batches, statistics_distance, statistics_in
from regauge.passes.calibration.image_noise import dead_leaves, image_noise, pink_noise
from regauge.passes.calibration.noise import noise_batches


def images(count: int, seed: int) -> torch.Tensor:
    """What the network knows: bright images of few frequencies."""
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * pink_noise((count, 3, 8, 8), generator) + 0.5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    for seed in range(30):
        model(images(64, seed))
    return model.eval()


def captured(model: nn.Module) -> Graph:
    return capture(model, (images(2, 0),), dynamic={0: {0: "batch"}})


def error(graph: Graph, pruned: Graph, x: torch.Tensor) -> float:
    (y,), (z,) = graph.run(x), pruned.run(x)
    return float((z - y).square().sum() / (y - y.mean(0)).square().sum())


def test_inputs_come_to_have_the_statistics_of_the_batch_norms() -> None:
    graph = captured(network())
    statistics = statistics_in(graph)
    assert len(statistics) == 2
    start, matched = generated_batches(graph, examples=64, steps=15)
    before, after = (float(statistics_distance(graph, batch, statistics)) for batch in (start, matched))
    known = float(statistics_distance(graph, (images(32, 99),), statistics))
    assert after < 0.25 * before and known < 0.25 * before


def test_the_distance_is_that_of_means_and_deviations() -> None:
    graph = Graph("norm")
    build = Builder(graph)
    ones = [
        build.parameter(name, torch.full((2,), value)) for name, value in zip("abcd", (1.0, 0.0, 1.0, 4.0), strict=True)
    ]
    x = build.relu(build.input("x", (4, 2), torch.float32))
    graph.outputs = [build.batch_norm(x, *ones, eps=0.0)]
    batch = torch.tensor([[1.0, 0.0], [1.0, 4.0], [5.0, 0.0], [5.0, 4.0]])
    # means 3 and 2, deviations 2: (3 - 1)^2 / 4 and (2 - 1)^2 / 4, and nothing of the deviations
    assert float(statistics_distance(graph, (batch,), statistics_in(graph))) == pytest.approx((1 + 0.25) / 2)
    # twice the batch: means 6 and 4, deviations 4: 25 / 4 and 9 / 4, and (4 / 2 - 1)^2
    found = float(statistics_distance(graph, (2 * batch,), statistics_in(graph)))
    assert found == pytest.approx((25 + 9) / 8 + 1)


def test_half_precision_is_matched_as_well_as_single() -> None:
    """Adam's small constant is zero in half: inputs made up in it became NaN."""
    distances = []
    for dtype in (torch.float16, torch.float32):
        graph = capture(network().to(dtype), (images(2, 0).to(dtype),), dynamic={0: {0: "batch"}})
        found = generated_batches(graph, examples=64)
        assert {batch[0].dtype for batch in found} == {dtype}
        distances.append(float(statistics_distance(graph, found[-1], statistics_in(graph))))
    assert distances[0] == pytest.approx(distances[1], rel=0.05)


def test_the_same_seed_makes_the_same_inputs() -> None:
    graph = captured(network())
    (a, b), (c, d), (e, _) = (generated_batches(graph, examples=8, steps=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a[0], c[0]) and torch.equal(b[0], d[0]) and not torch.equal(a[0], e[0])


def test_refitted_without_data_is_nearer_than_masked() -> None:
    graph, unseen = captured(network()), images(200, 77)
    masked = regauge.optimize(graph, "prune{macs=0.6,compensate=false}")
    refitted = regauge.optimize(graph, "prune{macs=0.6,examples=64}")
    assert error(graph, refitted, unseen) < 0.5 * error(graph, masked, unseen)
    assert "no data: 64 inputs are made up from the statistics of 2 batch norms" in str(refitted.report)
    assert "layers refitted on 64 examples" in str(refitted.report)


def test_a_single_batch_norm_is_told_as_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    report = regauge.optimize(captured(model), "prune{ratio=0.5,examples=8,steps=1}").report
    assert "from the statistics of 1 batch norm;" in str(report)


def test_what_can_be_told_at_once_is_told_before_inputs_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from regauge.passes.pruning import prune

    monkeypatch.setattr(prune, "generated_batches", lambda *_, **__: pytest.fail("inputs were made up"))
    graph = captured(network())
    assert not regauge.optimize(graph, "prune{params=1}").report.passes[0].changed
    with pytest.raises(PassError, match="matches no parameter"):
        regauge.optimize(graph, "prune{ratio=0.5,exclude=haed.*}")
    regauge.optimize(graph, "prune{ratio=0.5,score=l2}")
    regauge.optimize(graph, "prune{ratio=0.5,preserve=true}")


def test_the_first_try_speaks_of_the_options_that_were_given() -> None:
    with pytest.raises(PassError, match=r"prune\{macs=0.001\} cannot be met"):
        regauge.optimize(captured(network()), "prune{macs=0.001}")


@pytest.mark.parametrize("problem", [PassError("no inputs run"), RuntimeError("no derivative\nof this")])
def test_where_inputs_cannot_be_made_the_result_is_masked(problem: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from regauge.passes.pruning import prune

    def fail(*_: object, **__: object) -> None:
        raise problem

    graph = captured(network())
    masked = regauge.optimize(graph, "prune{ratio=0.5,compensate=false}")
    monkeypatch.setattr(prune, "generated_batches", fail)
    small = regauge.optimize(graph, "prune{ratio=0.5}")
    assert torch.equal(small.run(images(2, 5))[0], masked.run(images(2, 5))[0])
    assert f"which failed: {str(problem).splitlines()[0]}" in str(small.report)
    with pytest.raises((PassError, RuntimeError), match="no"):
        regauge.optimize(graph, "prune{ratio=0.5,compensate=true}")


def test_a_graph_without_batch_norms_is_refitted_on_noise() -> None:
    torch.manual_seed(0)
    graph = capture(nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4)), (torch.randn(8, 6),))
    refitted = regauge.optimize(graph, "prune{ratio=0.5}")
    masked = regauge.optimize(graph, "prune{ratio=0.5,compensate=false}")
    assert not masked.report.passes[0].notes
    assert "inputs are made up as noise, since there is no batch norm" in str(refitted.report)
    x = torch.randn(8, 6)
    assert error(graph, refitted, x) < 0.7 * error(graph, masked, x)


def test_gradients_take_inputs_that_are_made_up_too() -> None:
    small = regauge.optimize(captured(network()), "prune{ratio=0.5,score=fisher,compensate=false,examples=8}")
    assert "no data: 8 inputs" in str(small.report) and "refitted" not in str(small.report)


def test_noise_fits_types_and_tables() -> None:
    graph = Graph("tokens")
    build = Builder(graph)
    kinds = (torch.int64, torch.int64, torch.bool)
    ids, mask, kept = (build.input(n, (3, 5), t) for n, t in zip("imk", kinds, strict=True))
    found = build.embedding(build.parameter("table", torch.randn(7, 4)), ids)
    kept = build.unsqueeze(build.cast(kept, dtype=torch.float32), dim=2)
    graph.outputs = [build.mul(build.mul(found, kept), build.unsqueeze(build.cast(mask, dtype=torch.float32), dim=2))]
    batches = noise_batches(graph, examples=6)
    assert len(batches) == 2
    for tokens, ones, truths in batches:
        assert 0 <= int(tokens.min()) and int(tokens.max()) < 7 and len(tokens.unique()) > 2
        assert bool((ones == 1).all()) and bool(truths.all())
    assert not torch.equal(batches[0][0], batches[1][0])


def test_images_have_neighbours_that_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    for x in (image_noise((40, 3, 16, 16), 0), dead_leaves((40, 3, 16, 16), generator), image_noise((40, 8, 32), 0)):
        assert 0.5 < float(x.std()) < 2 and abs(float(x.mean())) < 0.6
        ahead, behind = (part - part.mean() for part in (x[..., 1:], x[..., :-1]))
        assert float((ahead * behind).mean() / (ahead.std() * behind.std())) > 0.6
    assert image_noise((2, 1, 8, 8, 8), 0).shape == (2, 1, 8, 8, 8)
