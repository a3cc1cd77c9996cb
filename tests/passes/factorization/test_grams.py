"""Metrics of inputs by their rows: the same as by their matrices."""

from typing import Any

import pytest
import torch
from torch import nn

from layer_kinds import drawn, layer_in, metric
from regauge.frontends.capture import capture
from regauge.passes.calibration.layers import matrices_of
from regauge.passes.factorization.catalog import FORMS
from regauge.passes.factorization.grams import Gram
from regauge.passes.factorization.problems import Problem
from regauge.passes.factorization.separated import Separated
from regauge.passes.factorization.turns import Turns
from regauge.passes.factorization.unfolded import Unfolded

COLUMNS, OUTPUTS = 72, 12
COUNTS = (3, 9, 18)  # rows of the bands


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [0, 5, 60])
def test_rows_give_what_their_moments_do(count: int) -> None:
    rows = drawn(count, 4, 6, 3, seed=1) if count else torch.zeros(0, 4, 6, 3).double()
    few = Gram.of_rows(rows.flatten(1), 0.3)
    full = Gram.of(few.matrix())
    torch.testing.assert_close(full.matrix(), rows.flatten(1).t() @ rows.flatten(1) + 0.3 * torch.eye(72).double())
    one, other = (own.unfolded((4, 6, 3), (0, 2, 1), 12) for own in (few, full))
    for _ in range(2):  # as they are, and behind a first link, where the ridge is a matrix
        change = drawn(7, *one.shape, seed=3)
        close(one.weighed(change), other.weighed(change))
        close(one.matrix(), other.matrix())
        close(one.over_rest(), other.over_rest())
        close(one.over_inner(), other.over_inner())
        assert one.shape == other.shape
        first = drawn(8, one.shape[0], seed=2)
        one, other = one.behind(first), other.behind(first)
    basis = torch.linalg.qr(drawn(12, 12))[0]
    one, other = (own.unfolded((4, 6, 3), (0, 2, 1), 12).turned(basis) for own in (few, full))
    close(one.matrix(), other.matrix())


def problems(banded: bool) -> tuple[Any, Problem, Problem]:
    """A graph and the same problem of its convolution by rows and by matrices."""
    graph = capture(nn.Conv2d(8, OUTPUTS, 3).double(), (drawn(1, 8, 6, 6),))
    layer = layer_in(graph)
    parts = [drawn(count, COLUMNS, seed=count) for count in COUNTS]
    few = Gram.of_rows(torch.cat(parts), 0.2)
    inputs, outputs, weight = few.matrix(), metric(OUTPUTS, 2), matrices_of(layer)[0]
    bands = [(Gram.of_rows(own, 0.05 * (1 + at)), metric(OUTPUTS, 3 + at)) for at, own in enumerate(parts)]
    full = [(Gram.of(own.matrix()), side) for own, side in bands]
    one = Problem(layer, weight, inputs, outputs, bands if banded else (), few)
    return graph, one, Problem(layer, weight, inputs, outputs, full if banded else ())


@pytest.mark.parametrize("name", ["tucker", "tucker-1", "columns", "rows"])
@pytest.mark.parametrize("banded", [True, False])
def test_forms_lose_the_same_by_rows(name: str, banded: bool) -> None:
    graph, few, full = problems(banded)
    assert few.error(torch.zeros_like(few.weight)) == pytest.approx(full.error(torch.zeros_like(few.weight)))
    one, other = (FORMS[name].choices(problem, graph, 1) for problem in (few, full))
    assert [own.numbers for own in one] == [own.numbers for own in other]
    assert len(one) > 4
    most = one[0].loss
    assert [own.loss for own in one] == pytest.approx([own.loss for own in other], rel=1e-8, abs=1e-9 * most)
    for choice in one[:: len(one) // 3]:
        found, wanted = (FORMS[name].links(problem, choice.numbers)[1] for problem in (few, full))
        assert full.error(found) == pytest.approx(full.error(wanted), rel=1e-6, abs=1e-9 * most)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "more"])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_what_bands_lose_is_the_same_with_the_largest_as_what_the_others_leave(rows: int, whole: bool) -> None:
    """Some bands by rows beside a metric that is not; they may add up to it, or to something else."""
    graph, few, full = problems(True)
    bands = [*few.bands[:rows], *full.bands[rows:]]
    assert full.inputs is not None
    inputs = full.inputs if whole else full.inputs + Gram.of_rows(drawn(30, COLUMNS, seed=9), 0.1).matrix()
    problem = Problem(full.layer, full.weight, inputs, full.outputs, bands)
    for form in (Separated("tucker", (0,), third=True), Separated("columns", (0, 1))):
        for choice in form.choices(problem, graph, 1)[::3]:
            unfolded = Unfolded(problem, form.first)
            first = unfolded.start(choice.ranks[0])
            behind = unfolded.behind(first)
            last = choice.ranks[1] if len(choice.ranks) > 1 else len(behind.down)
            lost = problem.error(unfolded.product(first, behind.down[:last], behind.up[:, :last]))
            assert choice.loss == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize("last", [None, 5])
@pytest.mark.parametrize("rows", [True, False])
def test_turns_know_what_their_parts_lose(last: int | None, rows: bool) -> None:
    problem = problems(True)[1 if rows else 2]
    unfolded = Unfolded(problem, (0,))
    plain = Turns(unfolded, [(unfolded.metric, problem.outputs)])
    parts, lost = plain.closed(unfolded.start(3), last)
    assert lost == pytest.approx(plain.lost(parts), rel=1e-9)
    first, better = plain.first_bettered(parts)
    assert better == pytest.approx(plain.lost((first, *parts[1:])), rel=1e-9)
    assert better < lost
    turns = Turns(unfolded, unfolded.metrics)
    assert turns.lost(parts) == pytest.approx(problem.error(unfolded.product(*parts)))
    found, lost = turns.bettered(parts)
    assert lost == pytest.approx(problem.error(unfolded.product(*found)), rel=1e-9)
    assert lost < turns.lost(parts)
