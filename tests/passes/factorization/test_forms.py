"""Forms of layers: exact at full rank, best in their metrics below."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from layer_kinds import KINDS, drawn, layer_in, metric
from regauge.frontends.capture import capture
from regauge.ir.cost import local_figures
from regauge.passes.calibration.layers import matrices_of
from regauge.passes.factorization.blocks import choices_of, links_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.chains import write_chain
from regauge.passes.factorization.forms import Form
from regauge.passes.factorization.grams import Gram
from regauge.passes.factorization.metric_svd import factored
from regauge.passes.factorization.on_data import Sensitivity, problems_on_data
from regauge.passes.factorization.problems import Problem, plain_problems
from regauge.passes.factorization.sparse_products import SparseProduct
from regauge.passes.factorization.structured import Structured
from regauge.passes.factorization.unfolded import Unfolded


@pytest.mark.parametrize("name", list(FORMS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_full_rank_is_exact(kind: str, name: str) -> None:
    form: Form = FORMS[name]
    build, shape = KINDS[kind]
    torch.manual_seed(0)
    x = drawn(*shape)
    graph = capture(build().double(), (x,))
    layer = layer_in(graph)
    if form.misfit(layer) is not None:
        assert name != "low-rank"
        return
    problems = [
        Problem(layer, weight, metric(layer.columns), metric(layer.outputs, 5)) for weight in matrices_of(layer)
    ]
    for numbers in form.lossless(layer):
        links, matrices = links_of(form, problems, numbers)
        assert torch.allclose(matrices, matrices_of(layer), atol=1e-8)
        changed = graph.copy()
        write_chain(changed, layer_in(changed), links, by="test")
        (before,), (after,) = graph.run(x), changed.run(x)
        assert float((before - after).abs().max()) < 1e-10 * max(1.0, float(before.abs().max())) * 1e2


@pytest.mark.parametrize(("rows", "columns"), [(5, 9), (9, 5)])
def test_factors_are_the_best_in_both_metrics(rows: int, columns: int) -> None:
    weight, inputs, outputs = drawn(rows, columns), metric(columns), metric(rows, 3)
    found = factored(weight, inputs, outputs)
    roots = torch.linalg.cholesky(outputs).t() @ weight @ torch.linalg.cholesky(inputs)
    values = torch.linalg.svdvals(roots).square()
    for rank in range(1, 5):
        up, down = found.of_rank(rank)
        off = weight - up @ down
        error = float(((outputs @ off @ inputs) * off).sum())
        assert error == pytest.approx(float(values[rank:].sum()), rel=1e-6)
        assert error == pytest.approx(float(found.tail[rank]), rel=1e-6)
        assert up.norm(dim=0).tolist() == pytest.approx(down.norm(dim=1).tolist())


def test_correlated_inputs_lose_a_third_at_most_of_what_plain_factors_lose() -> None:
    """So that a metric on the wrong side is noticed: the plain factors lose as much."""
    layer: Any = None
    weight, inputs = drawn(24, 32), metric(32)
    problem = Problem(layer, weight, inputs)
    up, down = factored(weight, inputs).of_rank(8)
    plain_up, plain_down = factored(weight).of_rank(8)
    assert problem.error(up @ down) < 0.3 * problem.error(plain_up @ plain_down)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "faust"])  # whose costs are entries
@pytest.mark.parametrize("kind", list(KINDS))
def test_costs_are_those_of_the_written_layers(kind: str, name: str) -> None:
    build, shape = KINDS[kind]
    graph = capture(build().double(), (drawn(*shape),))
    layer = layer_in(graph)
    form = FORMS[name]
    if form.misfit(layer) is not None:
        return
    for choice in choices_of(form, plain_problems(layer), graph, 1):
        changed = graph.copy()
        own = layer_in(changed)
        links = links_of(form, plain_problems(own), choice.numbers)[0]
        write_chain(changed, own, links, by="test")
        nodes = [node for node in changed.nodes if node is not own.node]
        assert local_figures(nodes, changed).macs == choice.macs
        assert sum(link.weight.numel() for link in links) == choice.parameters


@pytest.mark.parametrize("inputs", [None, metric(72)], ids=["plain", "metric"])
@pytest.mark.parametrize(
    "bands", [(), ((Gram.of(metric(72, 3)), metric(12, 4)), (Gram.of(metric(72, 5)), metric(12, 6)))], ids=len
)
def test_what_fewer_directions_lose_is_known_of_all_at_once(inputs: torch.Tensor | None, bands: Any) -> None:
    graph = capture(nn.Conv2d(8, 12, 3).double(), (drawn(1, 8, 6, 6),))
    layer = layer_in(graph)
    problem = Problem(layer, matrices_of(layer)[0], inputs, None if inputs is None else metric(12, 2), bands)
    choices = FORMS["tucker"].choices(problem, graph, 1)
    unfolded = Unfolded(problem, (0,))
    assert len({choice.numbers[1] for choice in choices}) > 4
    all_of_it = problem.error(torch.zeros_like(problem.weight))
    for choice in choices:
        rank, last = choice.numbers
        first = unfolded.start(rank)
        behind = unfolded.behind(first)
        whole = unfolded.product(first, behind.down[:last], behind.up[:, :last])
        assert choice.loss == pytest.approx(problem.error(whole), rel=1e-9, abs=1e-8 * all_of_it)  # a ridge of 1e-9


@pytest.mark.parametrize("name", ["tucker", "columns", "rows", "cp", "tt"])
def test_turns_better_the_first_guess_of_separated_convolutions(name: str) -> None:
    torch.manual_seed(0)
    graph = capture(nn.Conv2d(8, 12, 3).double(), (drawn(1, 8, 6, 6),))
    layer = layer_in(graph)
    problem = Problem(layer, matrices_of(layer)[0], metric(72), metric(12, 2))
    choices = FORMS[name].choices(problem, graph, 1)
    for choice in choices[:: max(1, len(choices) // 4)]:
        links, matrix = FORMS[name].links(problem, choice.numbers)
        assert problem.error(matrix) <= choice.loss * 1.0001
        assert sum(link.weight.numel() for link in links) == choice.parameters


def test_errors_that_are_alike_everywhere_count_more_where_outputs_are_pooled() -> None:
    """Predicted by bands as measured: without them the change of a mean over places is taken for a tenth of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    smooth = nn.functional.interpolate(drawn(64, 3, 3, 3), size=(10, 10), mode="bilinear")
    graph = capture(model, (smooth[:2],), dynamic={0: {0: "batch"}})
    layer = layer_in(graph)
    ((problem,),) = problems_on_data(graph, [layer], [(smooth,)], Sensitivity.of(graph, [layer], [(smooth,)], 0))
    _, matrix = FORMS["low-rank"].links(problem, (2,))
    moved = (smooth.unfold(2, 3, 1).unfold(3, 3, 1).mean((2, 3)).flatten(1)) @ (problem.weight - matrix).t()
    measured = float((moved - moved.mean(0)).square().sum()) / 64
    assert problem.error(matrix) == pytest.approx(measured, rel=0.5)
    assert replace(problem, bands=()).error(matrix) < 0.2 * measured


@pytest.mark.parametrize("name", list(FORMS))
def test_a_weight_of_zeros_is_factorized(name: str) -> None:
    graph = capture(nn.Conv2d(4, 6, 3).double(), (drawn(1, 4, 6, 6),))
    if isinstance(FORMS[name], Structured | SparseProduct):
        graph = capture(nn.Linear(36, 6).double(), (drawn(1, 36),))
    layer = layer_in(graph)
    problem = Problem(layer, torch.zeros(6, 36).double())
    for choice in FORMS[name].choices(problem, graph, 1)[::3]:
        links, matrix = FORMS[name].links(problem, choice.numbers)
        assert not matrix.any() and all(bool(link.weight.isfinite().all()) for link in links)
