"""Scores against a direct computation: the norm of what each index really owns, found by cutting it out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from random_networks import networks
from regauge.ir.dims.extents import Concat, Dim, Product
from regauge.ir.dims.kept import flat_indices
from regauge.ir.graph import Graph
from regauge.passes.pruning import weight_scores
from regauge.passes.pruning.batch_norm_scales import batch_norm_scales
from regauge.passes.pruning.score_table import score
from regauge.passes.pruning.scores import accumulate, scored_members
from regauge.passes.pruning.weight_scores import axis_sums


@given(networks())
def test_score_is_the_norm_of_the_owned_slices(graph: Graph) -> None:
    groups = [group for group in graph.groups() if group.free]
    scales = batch_norm_scales(graph)
    found = score(graph, groups, "l2", reduce="sum")
    for group in groups:
        expected = np.zeros(group.size)
        for member in scored_members(group):
            tensor, extent = member.parameter.tensor.double(), graph.axes.of[member.parameter][member.axis]
            for axis in range(tensor.dim()):
                if (member.parameter, axis) in scales:
                    factors = torch.from_numpy(scales[member.parameter, axis])
                    tensor = tensor * factors.reshape([-1] + [1] * (tensor.dim() - 1 - axis))
            for index in range(group.size):
                mine = torch.from_numpy(flat_indices(extent, {group.dim: np.array([index])}))
                others = torch.from_numpy(flat_indices(extent, {group.dim: np.array([], dtype=np.int64)}))
                only = [place for place in mine.tolist() if place not in set(others.tolist())]
                expected[index] += float(tensor.index_select(member.axis, torch.tensor(only)).square().sum())
        torch.testing.assert_close(found[group.dim], np.sqrt(expected) / np.sqrt(expected).mean())


def test_values_along_composite_axes() -> None:
    h, d, r = Dim(2, "h"), Dim(3, "d"), Dim(2, "r")
    axis = Concat((Product((h, d)), r, r))
    totals = {dim: np.zeros(dim.size) for dim in (h, d, r)}
    accumulate(axis, np.arange(10.0), totals)
    assert totals[h].tolist() == [0 + 1 + 2, 3 + 4 + 5]
    assert totals[d].tolist() == [0 + 3, 1 + 4, 2 + 5]
    assert totals[r].tolist() == [6 + 8, 7 + 9], "a Dim that occurs twice gets both"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from([1, 2]), st.integers(1, 40))
def test_sums_do_not_depend_on_the_chunks(shape: list[int], power: int, chunk: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = {len(shape) - 1: np.linspace(1, 2, shape[-1])}
    whole = tensor * torch.from_numpy(scale[len(shape) - 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_scores, "_CHUNK", chunk)
        found = axis_sums(tensor, range(len(shape)), power, scale)
    for axis, sums in found.items():
        others = [other for other in range(len(shape)) if other != axis]
        expected = whole.abs().pow(power)
        torch.testing.assert_close(torch.from_numpy(sums), expected.sum(others) if others else expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_narrow_and_complex_weights(dtype: torch.dtype) -> None:
    sums = axis_sums(torch.full((3, 4), 300, dtype=dtype), [0], 2, {})
    assert sums[0] == pytest.approx([4 * 300**2] * 3, rel=0.01)
