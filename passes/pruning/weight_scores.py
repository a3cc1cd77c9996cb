"""Scores from the weights alone, in one streaming read of the parameters.

Only sums along axes are kept, never a tensor, so that a model on disk is read once and the memory stays near one tensor
(``fpgm`` compares slices with one another: it holds one parameter and a square matrix of distances).

What a BatchNorm does to the channels of the layer before it is part of that layer's weight: rows are scaled by
|gamma| / sqrt(var + eps) before they are measured (:mod:`regauge.passes.pruning.batch_norm_scales`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch

from regauge.ir.dims.extents import positions_on
from regauge.ir.dims.groups import Group, Member
from regauge.ir.dtypes import widened
from regauge.ir.graph import Graph, Parameter
from regauge.passes.pruning.batch_norm_scales import batch_norm_scales
from regauge.passes.pruning.scores import MemberScores, Scores, numbers, on_dim, scored_members, summed

Measure: TypeAlias = Callable[[Parameter, list[int]], dict[int, np.ndarray]]

_CHUNK = 1 << 22  # elements that are measured at a time


def magnitudes(graph: Graph, groups: Sequence[Group], power: int) -> MemberScores:
    """Sums of |w|^power over the slice of each index, for each member."""
    scales = batch_norm_scales(graph)
    plain = [group for group in groups if not group.majors]

    def sums(parameter: Parameter, axes: list[int]) -> dict[int, np.ndarray]:
        return axis_sums(numbers(parameter), axes, power, _scale(scales, parameter))

    found = _sums_of(plain, sums)

    def of_member(group: Group, member: Member) -> np.ndarray:
        axes = graph.axes.of[member.parameter]
        if not group.majors:
            return on_dim(axes[member.axis], group.dim, found[member.parameter][member.axis])
        tensor = _scaled(_widened(numbers(member.parameter)), _scale(scales, member.parameter))
        powers = tensor.abs() if power == 1 else tensor.square()
        return summed(axes, member.axis, (*group.majors, group.dim), powers)

    return {group.dim: [of_member(group, member) for member in scored_members(group, codes=True)] for group in groups}


def _sums_of(groups: Sequence[Group], measure: Measure) -> dict[Parameter, dict[int, np.ndarray]]:
    wanted: dict[Parameter, dict[int, None]] = {}
    for group in groups:
        for member in scored_members(group, codes=True):
            wanted.setdefault(member.parameter, {})[member.axis] = None
    return {parameter: measure(parameter, list(axes)) for parameter, axes in wanted.items()}


def _scale(scales: Mapping[tuple[Parameter, int], np.ndarray], parameter: Parameter) -> dict[int, np.ndarray]:
    return {axis: scales[parameter, axis] for axis in range(parameter.rank) if (parameter, axis) in scales}


def axis_sums(
    tensor: torch.Tensor, axes: Sequence[int], power: int, scale: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """For each axis the sums of |w|^power over all others, in one pass; ``scale`` multiplies along an axis first."""
    tensor = tensor.detach()
    result = {axis: np.zeros(tensor.shape[axis]) for axis in axes}
    rows = max(1, _CHUNK // max(1, tensor[:1].numel()))
    for start in range(0, tensor.shape[0], rows):
        own = {axis: factors[start : start + rows] if axis == 0 else factors for axis, factors in scale.items()}
        chunk = _scaled(_widened(tensor[start : start + rows]), own)
        chunk = chunk.abs() if power == 1 else chunk.square()
        for axis in axes:
            others = [other for other in range(chunk.dim()) if other != axis]
            sums = (chunk.sum(others, dtype=torch.float64) if others else chunk.double()).numpy()
            if axis == 0:
                result[axis][start : start + rows] += sums
            else:
                result[axis] += sums
    return result


def _scaled(tensor: torch.Tensor, scale: Mapping[int, np.ndarray]) -> torch.Tensor:
    for axis, factors in scale.items():
        tensor = tensor * torch.as_tensor(factors, dtype=tensor.dtype).reshape([-1] + [1] * (tensor.dim() - 1 - axis))
    return tensor


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """Real numbers wide enough to be squared and summed."""
    tensor = tensor.cpu()
    if tensor.is_complex():
        return tensor.abs()
    return widened(tensor)


def lamp(squares: np.ndarray) -> np.ndarray:
    """Layer-adaptive magnitudes u_k / sum of all u_l >= u_k of the Dim (Lee et al. 2021, eq. 3), from squares u.

    The best index of every Dim scores 1, so that a ranking of all Dims empties none.
    """
    order = np.argsort(squares, kind="stable")
    ranked = squares[order]
    remaining = np.cumsum(ranked[::-1])[::-1]
    found = np.empty_like(squares)
    found[order] = np.divide(ranked, remaining, out=np.zeros_like(ranked), where=remaining > 0)
    return found


def geometric_median(graph: Graph, groups: Sequence[Group]) -> MemberScores:
    """Sums of the distances of each index's slice to those of all others (FPGM, He et al. 2019, eq. 4), per member.

    The lowest are nearest to the geometric median of the slices: the others say what they say.
    """
    scales = batch_norm_scales(graph)
    found: MemberScores = {}
    for group in groups:
        found[group.dim] = []
        for member in scored_members(group, codes=True):
            tensor = _scaled(_widened(numbers(member.parameter)).double(), _scale(scales, member.parameter))
            places = torch.from_numpy(positions_on(graph.axes.of[member.parameter][member.axis], group.dim))
            rows = tensor.movedim(member.axis, 0)[places].flatten(1)
            found[group.dim].append(torch.cdist(rows, rows).sum(1).numpy())
    return found


def chance(groups: Sequence[Group], seed: int) -> Scores:
    """Uniform random numbers: what every other score has to beat."""
    draws = np.random.default_rng(seed)
    return {group.dim: draws.random(group.choices) for group in groups}
