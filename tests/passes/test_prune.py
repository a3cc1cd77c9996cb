"""Options of ``prune``: ratios, budgets, scopes, names, rounding, and what the report says."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from random_networks import networks
from regauge.frontends.capture import capture
from regauge.ir.cost import figures
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.ir.storage.weights import LazyWeight
from regauge.optimize import optimize
from regauge.passes.pruning.prune import Prune
from regauge.passes.pruning.selection import best
from small_graphs import multilayer_perceptron, residual_network


def sizes(graph: Graph) -> dict[str, int]:
    return {group.name: group.size for group in graph.groups() if group.free}


def test_uniform_ratio_cuts_every_free_dim_alike() -> None:
    graph = residual_network(16)
    small = optimize(graph, "prune{compensate=false,ratio=0.25}")
    assert sizes(small) == {"stem.weight:0": 12, "block0.first.weight:0": 24, "block1.first.weight:0": 24}
    assert small.find("logits").shape == graph.find("logits").shape
    assert sizes(graph)["stem.weight:0"] == 16, "the given graph is never changed"


@pytest.mark.parametrize("option", ["params", "macs", "bytes"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])
def test_budget_is_met_within_one_percent(option: str, scope: str, share: float) -> None:
    graph = residual_network(48, 3)
    small = optimize(graph, Prune(**{option: share, "scope": scope}, compensate=False))
    metric = {"params": "parameters", "macs": "macs", "bytes": "bytes"}[option]
    reached = getattr(figures(small), metric) / getattr(figures(graph), metric)
    assert 0.99 * share <= reached <= share


def test_absolute_budgets() -> None:
    graph = residual_network(32)
    parameters = figures(optimize(graph, "prune{compensate=false,params=20K}")).parameters
    assert 19_800 <= parameters <= 20_000
    size = figures(optimize(graph, "prune{compensate=false,bytes=0.2MB}")).bytes
    assert 198_000 <= size <= 200_000


@given(networks(), st.sampled_from([0.3, 0.6, 0.9]), st.sampled_from(["uniform", "global"]))
def test_budget_is_never_exceeded(graph: Graph, share: float, scope: str) -> None:
    try:
        small = optimize(graph, Prune(macs=share, scope=scope, compensate=False))
    except PassError as error:
        assert "cannot be met" in str(error)
    else:
        assert figures(small).macs <= share * figures(graph).macs


def test_impossible_budget_says_what_is_left() -> None:
    with pytest.raises(
        PassError, match=r"prune\{params=1K,.*minimum=8\} cannot be met: .* in params are left, and 1K are wanted"
    ):
        optimize(residual_network(16), "prune{params=1K,minimum=8}")


def test_large_enough_budget_changes_nothing() -> None:
    assert not optimize(residual_network(), "prune{params=1}").report.passes[0].changed


def test_several_hundred_dims_take_less_than_a_second() -> None:
    graph = multilayer_perceptron(8, *[24] * 400, 8)
    graph.groups()
    start = time.perf_counter()
    small = optimize(graph, "prune{compensate=false,macs=0.5,scope=global}")
    assert time.perf_counter() - start < 2.0  # about 0.4 s on one core that has nothing else to do
    assert len(small.report.passes[0].cuts) > 300


def test_global_scope_cuts_weak_layers_more_but_leaves_a_tenth() -> None:
    graph = multilayer_perceptron(8, 40, 40, 8)
    weak = graph.parameters["layer0.weight"]
    tensor = weak.tensor.clone()
    tensor[:30] *= 1e-3
    graph.parameters["layer0.weight"].weight = type(weak.weight)(tensor)  # type: ignore[call-arg]
    graph.parameters["layer1.weight"].weight = type(weak.weight)(graph.parameters["layer1.weight"].tensor * 1.0)  # type: ignore[call-arg]
    assert sizes(optimize(graph, "prune{ratio=0.97,scope=global}")) == {"layer0.weight:0": 4, "layer1.weight:0": 4}


def test_lowest_scores_go() -> None:
    graph = multilayer_perceptron(3, 6, 3)
    weight = graph.parameters["layer0.weight"].tensor.clone()
    weight[[1, 4]] = 0.01
    after = graph.parameters["layer1.weight"].tensor.clone()
    after[:, [1, 4]] = 0.01
    for name, tensor in (("layer0.weight", weight), ("layer1.weight", after)):
        graph.parameters[name].weight = type(graph.parameters[name].weight)(tensor)  # type: ignore[call-arg]
    for score in ("l1", "l2", "bn"):
        small = optimize(graph, Prune(ratio=0.34, score=score))
        torch.testing.assert_close(small.parameters["layer0.weight"].tensor, weight[[0, 2, 3, 5]])


def test_random_scores_follow_the_seed() -> None:
    graph = multilayer_perceptron(3, 30, 3)

    def kept(seed: int) -> torch.Tensor:
        return optimize(graph, Prune(ratio=0.5, score="random", seed=seed)).parameters["layer0.weight"].tensor

    assert torch.equal(kept(1), kept(1)) and not torch.equal(kept(1), kept(2))


@pytest.mark.parametrize(("ratio", "expected"), [(0.3, 12), (0.5, 8), (0.95, 4)])
def test_round_to(ratio: float, expected: int) -> None:
    small = optimize(multilayer_perceptron(3, 16, 3), Prune(ratio=ratio, round_to=4))
    assert sizes(small) == {"layer0.weight:0": expected}


def test_round_to_leaves_dims_that_are_smaller() -> None:
    assert sizes(optimize(multilayer_perceptron(3, 6, 3), "prune{ratio=0.5,round_to=8}")) == {"layer0.weight:0": 6}


def test_minimum() -> None:
    assert sizes(optimize(multilayer_perceptron(3, 16, 3), "prune{ratio=0.9,minimum=5}")) == {"layer0.weight:0": 5}


def test_include_and_exclude() -> None:
    graph = residual_network(16)
    only = optimize(graph, "prune{compensate=false,ratio=0.5,include=block0.*first*}")
    assert sizes(only) == {"stem.weight:0": 16, "block0.first.weight:0": 16, "block1.first.weight:0": 32}
    inner = optimize(graph, "prune{compensate=false,ratio=0.5,include=block1.*}")
    assert sizes(inner) == {"stem.weight:0": 16, "block0.first.weight:0": 32, "block1.first.weight:0": 16}
    but = optimize(graph, 'prune{compensate=false,ratio=0.5,exclude=["block0.first.weight:0","head.*"]}')
    assert sizes(but) == {"stem.weight:0": 16, "block0.first.weight:0": 32, "block1.first.weight:0": 16}
    assert but.report.passes[0].left["excluded"] >= 2


def test_a_pattern_that_names_a_module_stands_for_what_is_in_it() -> None:
    graph = residual_network(16)
    for name in ("block1", "block?"):
        whole = optimize(graph, f"prune{{compensate=false,ratio=0.5,include={name}}}")
        assert sizes(whole) == sizes(optimize(graph, f"prune{{compensate=false,ratio=0.5,include={name}.*}}"))
    layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    captured = capture(layers, (torch.randn(2, 4),))
    pruned = optimize(captured, "prune{ratio=0.5,compensate=false,exclude=[2]}")
    assert pruned.parameters["2.weight"].shape == (8, 8)
    assert optimize(captured, "prune{ratio=0.5,compensate=false,exclude=[0]}").parameters["2.weight"].shape == (4, 8)


def test_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(PassError, match=r"exclude=haed.\* matches no parameter and no Dim: did you mean head"):
        optimize(residual_network(), "prune{ratio=0.5,exclude=haed.*}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"takes a ratio, or budgets \(params, macs, bytes, peak, latency\), but none is given"),
        ({"ratio": 0.5, "macs": 0.5}, "but ratio and macs are given"),
        ({"ratio": 1.0}, "'ratio' of prune must be at least 0 and below 1, not 1"),
        ({"ratio": -0.1}, "'ratio' of prune must be at least 0 and below 1, not -0.1"),
        ({"ratio": "half"}, "'ratio' of prune must be a number, not 'half'"),
        ({"params": "many"}, "params=many is not an amount"),
        ({"macs": 0}, "macs=0 is out of range"),
        ({"ratio": 0.5, "score": "l3"}, "there is no score 'l3': scores are distortion, l1, l2, bn"),
        ({"ratio": 0.5, "round_to": 0}, "'round_to' of prune must be at least 1"),
        ({"ratio": 0.5, "device": "gpu"}, "'device' of prune is for latency or round_to=device"),
        ({"ratio": 0.5, "score": "l1", "loss": len}, "'loss' of prune is for scores that need one"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Prune(**options)  # type: ignore[arg-type]


def test_report_names_cuts_and_reasons() -> None:
    report = str(optimize(residual_network(16), "prune{compensate=false,ratio=0.5}").report)
    assert "stem.weight:0: 16 -> 8" in report
    assert "left alone: 1 x it is an axis of a graph output" in report


def test_report_says_where_a_norm_sees_fewer_entries() -> None:
    small = optimize(multilayer_perceptron(4, 16, 4, norm=True), "prune{ratio=0.5,compensate=false}")
    assert small.report.passes[0].notes == ("layer_norm is computed over the kept indices of 1 Dim",)


def test_report_says_which_dims_have_no_batch_norm() -> None:
    plain = optimize(multilayer_perceptron(4, 16, 4), "prune{ratio=0.5,score=bn}")
    assert plain.report.passes[0].notes == ("1 of 1 Dims have no BatchNorm and are scored by l2",)
    assert not optimize(residual_network(16), "prune{ratio=0.5,score=bn}").report.passes[0].notes


def test_scores_do_not_depend_on_whether_batch_norms_are_folded() -> None:
    graph = residual_network(16)
    folded = graph.copy()
    for name in ("stem", "block0.first", "block0.second"):
        weight, bn = folded.parameters[f"{name}.weight"], f"{name}.bn"
        variance = folded.parameters[f"{bn}.var"].tensor
        scale = folded.parameters[f"{bn}.weight"].tensor * (variance + 1e-5) ** -0.5
        replacements = {
            f"{name}.weight": weight.tensor * scale[:, None, None, None],
            f"{bn}.weight": torch.ones_like(scale),
            f"{bn}.var": torch.ones_like(scale) - 1e-5,
        }
        for key, tensor in replacements.items():
            folded.parameters[key].weight = type(weight.weight)(tensor)  # type: ignore[call-arg]
    kept = [
        optimize(g, "prune{compensate=false,ratio=0.5}").parameters["block1.first.weight"].tensor
        for g in (graph, folded)
    ]
    torch.testing.assert_close(*kept)


def test_weights_are_read_once_for_scoring() -> None:
    graph = multilayer_perceptron(4, 12, 12, 4)
    reads: dict[str, int] = {}
    for name, parameter in graph.parameters.items():
        tensor = parameter.tensor

        def read(name: str = name, tensor: torch.Tensor = tensor) -> torch.Tensor:
            reads[name] = reads.get(name, 0) + 1
            return tensor

        parameter.weight = LazyWeight(tuple(tensor.shape), tensor.dtype, read)
    optimize(graph, "prune{compensate=false,macs=0.5,scope=global}")
    assert set(reads.values()) == {1}, "one read to score; cut weights stay where they are until they are written"


def test_best_prefers_the_first_of_equals() -> None:
    assert best(np.array([1.0, 2.0, 1.0, 2.0]), 3).tolist() == [0, 1, 3]


def test_limit_cuts_only_the_first_dims() -> None:
    small = optimize(residual_network(16), "prune{compensate=false,ratio=0.5,limit=1}")
    assert [cut.dim for cut in small.report.passes[0].cuts] == ["stem.weight:0"]


def test_dims_at_the_minimum_are_told() -> None:
    report = optimize(residual_network(16), "prune{compensate=false,ratio=0.5,minimum=16}").report
    assert report.passes[0].left["it has no more than the minimum of 16 indices"] > 0
