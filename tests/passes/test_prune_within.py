"""Pruning what lies within heads, groups and experts: each keeps what it needs most."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import regauge
from headed_networks import Attention, Experts, Groups, captured, expect_masked
from regauge.ir.dims.groups import find_group
from regauge.ir.dims.kept import KeptWithin
from regauge.ir.dims.majors import majors_of
from regauge.ir.dims.resize import kept_indices
from regauge.ir.graph import Graph
from regauge.ir.running.interpret import run
from regauge.passes.calibration.layers import layer_of
from regauge.passes.calibration.moments import Moments
from regauge.passes.pruning import surgeon
from regauge.passes.pruning.score_table import SCORES
from regauge.passes.pruning.scores import normalised, profile
from regauge.passes.pruning.surgeon import Share, taken_apart


def halves() -> tuple[Graph, list[torch.Tensor]]:
    """An attention whose first head of values uses its last four channels, and the second its first four."""
    torch.manual_seed(0)
    graph = captured(Attention())
    value = graph.parameters["v.weight"].tensor
    value[:4] *= 1e-3
    value[12:] *= 1e-3
    graph.parameters["v.bias"].tensor[:4] *= 1e-3
    graph.parameters["v.bias"].tensor[12:] *= 1e-3
    return graph, [torch.randn(16, 5, 12).double() for _ in range(3)]


def error(graph: Graph, small: Graph) -> float:
    x = torch.randn(8, 5, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = run(graph, [x])[0]
    return float((run(small, [x])[0] - expected).norm() / expected.norm())


@pytest.mark.parametrize("score", ["l2", "distortion", "taylor"])
def test_each_head_keeps_the_channels_that_it_uses(score: str) -> None:
    graph, data = halves()
    text = f"prune{{ratio=0.5,score={score},include=v.weight:0.1,compensate=false"
    small = regauge.optimize(graph, text + "}", data=data)
    kept = kept_indices(graph, small)[find_group(graph, "v.weight:0.1").dim]
    assert isinstance(kept, KeptWithin) and kept.indices.tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert "Dims that keep other indices in each head, group or expert: 1" in str(small.report)
    shared = regauge.optimize(graph, text + ",separate=false}", data=data)
    assert not isinstance(kept_indices(graph, shared)[find_group(graph, "v.weight:0.1").dim], KeptWithin)
    assert error(graph, small) < 0.01 < 0.3 < error(graph, shared)


def test_refitted_layers_follow() -> None:
    graph, data = halves()
    errors = [
        error(graph, regauge.optimize(graph, f"prune{{params=0.8,separate={separate}}}", data=data))
        for separate in ("true", "false")
    ]
    assert errors[0] < 0.8 * errors[1], errors


@pytest.mark.parametrize("score", [name for name, entry in SCORES.items() if entry.apart])
@pytest.mark.parametrize("model", [Attention, Experts])
def test_pruned_equals_masked_by_every_score_that_tells_heads_apart(model: Callable[[], nn.Module], score: str) -> None:
    torch.manual_seed(0)
    graph = captured(model())
    data = [torch.randn(4, 5, 12).double() for _ in range(2)]
    small = regauge.optimize(graph, f"prune{{ratio=0.5,score={score},compensate=false}}", data=data)
    within = [kept for kept in kept_indices(graph, small).values() if isinstance(kept, KeptWithin)]
    assert len(within) == (3 if model is Attention else 1)
    assert any((kept.indices[0] != kept.indices[1]).any() for kept in within)
    expect_masked(graph, small, data[:1])


def test_a_score_that_does_not_tell_heads_apart_keeps_the_same_in_all() -> None:
    graph, data = halves()
    small = regauge.optimize(graph, "prune{ratio=0.5,score=activation,include=v.weight:0.1}", data=data)
    assert np.ndim(kept_indices(graph, small)[find_group(graph, "v.weight:0.1").dim]) == 1


def test_losses_are_measured_with_what_each_head_keeps() -> None:
    graph, data = halves()
    small = regauge.optimize(graph, "prune{params=0.85,scope=dp}", data=data)
    assert small.report.after.parameters <= 0.86 * small.report.before.parameters
    assert any(isinstance(kept, KeptWithin) for kept in kept_indices(graph, small).values())


def test_allocators_see_what_goes_with_one_more_index_in_each_major() -> None:
    scores = np.array([[3.0, 1.0, 2.0], [5.0, 6.0, 4.0]])
    assert profile(scores).tolist() == [1 + 4, 2 + 5, 3 + 6]
    for how in ("mean", "max", "minmax", "zscore"):
        np.testing.assert_allclose(profile(normalised(scores, how)), normalised(profile(scores), how))


# -- taking a Dim apart ------------------------------------------------------------------------------------------------


def shares_of_groups() -> tuple[Graph, list[Share], list[torch.Tensor]]:
    """What each group of a convolution says of its channels, and their rows."""
    torch.manual_seed(0)
    graph = captured_groups()
    layer = layer_of(graph.nodes[2], blocks=True)
    assert layer is not None and layer.node.attributes["groups"] == 2
    dim = find_group(graph, "a.weight:0.1").dim
    rows = [torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) for _ in range(2)]
    shares = []
    for block, x in enumerate(rows):
        moments = Moments(6)
        moments.add(x)
        sensitivity = {layer: torch.ones(2, layer.outputs, dtype=torch.float64)}
        majors = majors_of(graph, [dim])[dim]
        shares.append(Share.of(graph, dim, [layer], sensitivity, block, moments, majors))
    return graph, shares, rows


def captured_groups() -> Graph:
    return regauge.capture(Groups().double().eval(), (torch.randn(2, 5, 9).double(),))


def test_groups_that_have_nothing_in_common_are_taken_apart_as_if_alone() -> None:
    _, shares, _ = shares_of_groups()
    assert [share.columns[:, 0].tolist() for share in shares] == [[*range(6), *[-1] * 6], [*[-1] * 6, *range(6)]]
    together, _ = taken_apart(shares, 6, None, 2)
    for block, share in enumerate(shares):
        share.columns = share.columns[6 * block : 6 * block + 6]
        alone, _ = taken_apart([share], 6, None)
        np.testing.assert_allclose(together[6 * block : 6 * block + 6], alone)


def test_of_a_dim_that_does_not_fit_the_cheapest_of_each_major_are_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    _, shares, _ = shares_of_groups()
    whole, _ = taken_apart(shares, 6, None, 2)
    monkeypatch.setattr(surgeon, "MEMORY", sum(share.bytes(12) for share in shares) // 3)
    part, _ = taken_apart(shares, 6, None, 2)
    assert np.isfinite(part).all() and (part > 0).all()
    for block in range(2):
        own = slice(6 * block, 6 * block + 6)
        assert np.argmin(part[own]) == np.argmin(whole[own])
