"""Cutting a Dim within others: each head, group or expert keeps indices of its own, and nothing notices.

What was kept is read off the values of the weights, each of which occurs once.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import regauge
from headed_networks import Attention, Experts, FusedHeads, Gates, Groups, Sums, captured, expect_masked
from regauge.ir.dims.extents import Dim
from regauge.ir.dims.groups import find_group, free_groups
from regauge.ir.dims.kept import KeptWithin, part_kept
from regauge.ir.dims.majors import majors_of
from regauge.ir.dims.resize import kept_indices, resize
from regauge.ir.errors import AxisError, GraphError
from regauge.ir.graph import Graph
from regauge.ir.memory.mapped import mapped
from regauge.ir.running.interpret import run
from regauge.ir.storage.weights import dense


def majors(graph: Graph) -> dict[str, list[str]]:
    """By name the Dims that lie within others, with these."""
    found = majors_of(graph, [group.dim for group in free_groups(graph)])
    return {dim.name: [major.name for major in others] for dim, others in found.items() if others}


def cut_within(graph: Graph, *, majors_too: bool = False) -> tuple[Graph, dict[Dim, Any]]:
    """The graph with half of each Dim that lies within others, other indices in each; and what was kept."""
    draws = np.random.default_rng(0)
    found = majors_of(graph, [group.dim for group in free_groups(graph)])
    keep: dict[Dim, Any] = {}
    for dim, others in found.items():
        size = int(dim.size)
        if others:
            keep[dim] = draws.permuted(
                np.broadcast_to(np.arange(size), (*(int(m.size) for m in others), size)), axis=-1
            )
            keep[dim] = keep[dim][..., : size // 2]
        elif majors_too and any(dim in ms for ms in found.values()):
            keep[dim] = np.array([size - 1])
    assert keep
    return resize(graph, keep), keep


HEADS = {"q.weight:0.1": ["q.weight:0.0"], "q.weight:0.2": ["q.weight:0.0"], "v.weight:0.1": ["q.weight:0.0"]}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: Attention(), HEADS),
        (lambda: Attention("rotary"), {k: v for k, v in HEADS.items() if k != "q.weight:0.2"}),
        (lambda: Attention("gain"), {k: v for k, v in HEADS.items() if k != "q.weight:0.2"}),
        (lambda: Attention("mixed values"), {"q.weight:0.1": ["mix:0.0"], "q.weight:0.2": ["mix:0.0"]}),
        (lambda: FusedHeads(), {f"qkv.weight:0.{place}": ["qkv.weight:0.0"] for place in (1, 5)}),
        (lambda: Experts(), {"up:2": ["up:0"]}),
        (lambda: Sums(), {}),
    ],
)
def test_what_lies_within_what(model: Any, expected: dict[str, list[str]]) -> None:
    assert majors(captured(model())) == expected


@pytest.mark.parametrize("majors_too", [False, True])
@pytest.mark.parametrize(
    "model", [Attention, lambda: Attention("rotary"), lambda: Attention("mixed scores"), FusedHeads, Experts]
)
def test_pruned_equals_masked(model: Any, majors_too: bool) -> None:
    torch.manual_seed(0)
    graph = captured(model())
    small, _ = cut_within(graph, majors_too=majors_too)
    expect_masked(graph, small, [torch.randn(3, 5, 12).double()])


def test_explain_names_the_majors() -> None:
    graph = captured(Attention("rotary"))
    text = "indices of it can be removed, other ones in each of q.weight:0.0"
    assert text in graph.explain("v.weight:0.1") and text not in graph.explain("q.weight:0.2")


def test_each_group_of_a_convolution_keeps_channels_of_its_own() -> None:
    model = Groups().double().eval()
    graph = regauge.capture(model, (torch.randn(2, 5, 9).double(),), dynamic={0: {0: "batch"}})
    assert majors(graph) == {"a.weight:0.1": ["a.weight:0.0"], "b.weight:0.1": ["a.weight:0.0"]}
    small = resize(graph, {"a.weight:0.1": [[0, 1, 5], [2, 3, 4]], "b.weight:0.1": [[0, 2], [1, 3]]})
    assert [list(small.parameters[f"{name}.weight"].shape[:2]) for name in "abc"] == [[6, 5], [4, 3], [6, 4]]
    torch.testing.assert_close(
        small.parameters["b.weight"].tensor[:, :, 0],
        torch.cat([model.b.weight[[0, 2]][:, [0, 1, 5], 0], model.b.weight[[5, 7]][:, [2, 3, 4], 0]]),
    )
    expect_masked(graph, small, [torch.randn(2, 5, 9).double()])


def test_it_is_written_as_any_other_cut(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    x = torch.randn(2, 5, 12)
    exported = regauge.load(regauge.capture(model, (x,)).to_onnx(tmp_path / "whole.onnx"))
    for graph in (regauge.capture(model, (x,)), exported):
        found = {int(group.size): group.name for group in free_groups(graph) if int(group.size) == 8}
        small = resize(graph, {found[8]: [[0, 1, 7], [2, 4, 5]]})
        expected = run(small, [x])[0]
        torch.testing.assert_close(small.to_torch()(x), expected, rtol=1e-4, atol=1e-5)
        again = regauge.load(small.to_onnx(tmp_path / "small.onnx"))
        torch.testing.assert_close(run(again, [x])[0], expected, rtol=1e-4, atol=1e-5)


def test_cuts_in_a_row_are_told_as_one() -> None:
    graph = regauge.capture(Groups(4).double().eval(), (torch.randn(2, 5, 9).double(),))
    within, groups = "a.weight:0.1", "a.weight:0.0"
    small = resize(graph, {groups: [0, 2, 3], within: [[0, 1, 2], [1, 2, 3], [0, 2, 3], [0, 1, 3]]})
    small = resize(small, {within: [[0, 1], [1, 2], [0, 2]]})
    small = resize(small, {groups: [1, 2]})
    found = kept_indices(graph, small)
    for parameter in graph.all_parameters():
        left = part_kept(parameter.tensor, graph.axes.of[parameter], found)
        assert torch.equal(left, small.parameters[parameter.name].tensor), parameter
    kept = found[find_group(graph, within).dim]
    assert isinstance(kept, KeptWithin) and kept.indices[2:].tolist() == [[2, 3], [0, 3]]


def test_a_major_may_lie_within_another() -> None:
    graph = captured(Gates())
    assert majors(graph) == {"gate:1": ["gate:0"], "a.weight:0.2": ["gate:0", "gate:1"]}
    small, keep = cut_within(graph)
    assert sorted(np.shape(kept) for kept in keep.values()) == [(2, 1), (2, 3, 2)]
    expect_masked(graph, small, [torch.randn(2, 5, 12).double()])
    with pytest.raises(AxisError, match="was cut within several Dims"):
        kept_indices(graph, resize(resize(graph, {"gate:1": [[0, 1], [1, 2]]}), {"a.weight:0.2": [[[1]] * 2] * 2}))


def test_a_mapped_weight_is_read_when_it_is_asked_for() -> None:
    graph = captured(Experts())
    expected, keep = cut_within(graph)
    for parameter in graph.all_parameters():
        parameter.weight = dense(mapped(parameter.tensor))
    small = resize(graph, keep)
    for name, parameter in small.parameters.items():
        assert "Reordered" in repr(parameter.weight) and parameter.weight.shape == expected.parameters[name].shape
        assert torch.equal(parameter.tensor, expected.parameters[name].tensor)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([[0, 1]], "shape .1, 2., but it lies within q.weight:0.0, 2"),
        ([[0, 1], [2, 2]], "keep at least one of them, and no other"),
        ([[0, 8], [1, 2]], "has the indices 0..7"),
    ],
)
def test_other_arrays_are_refused(indices: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        resize(captured(Attention()), {"v.weight:0.1": indices})


def test_a_dim_within_no_other_takes_one_list() -> None:
    with pytest.raises(GraphError, match="lies within no other Dim: give one list"):
        resize(captured(Attention("rotary")), {"q.weight:0.2": [[0, 1], [2, 3]]})
