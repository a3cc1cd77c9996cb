"""Importance of every index of every Dim, from the weights alone, in one streaming read of the parameters.

What data says of it is in :mod:`regauge.passes.pruning.distortion`.

A Dim's members are (parameter, axis) pairs. Index i of the Dim owns a slice of each member; its score adds up the
magnitudes of these slices. Only sums along axes are kept, never a tensor, so that a model on disk is read once and the
memory stays near one tensor.

What a BatchNorm does to the channels of the layer before it is part of that layer's weight: rows are scaled by
|gamma| / sqrt(var + eps) before they are measured. So a network scores alike before and after BatchNorms are folded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch

from regauge.ir.extents import Dim, Extent, Product, leaves, resolve, size_of
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.groups import Group, Member

Criterion: TypeAlias = Literal["distortion", "l1", "l2", "bn", "random"]
Scores: TypeAlias = dict[Dim, np.ndarray]
Axis: TypeAlias = tuple[Parameter, int]

_CHUNK = 1 << 22  # elements that are measured at a time
_WEIGHT_AXIS = {"conv": (1, 0), "linear": (1, 0), "matmul": (1, -1)}  # operand and axis of a layer's output channels


def score(graph: Graph, groups: Sequence[Group], criterion: Criterion, seed: int = 0) -> Scores:
    """One score per index of each group's Dim, higher is more important; their mean over a Dim is 1.

    A Dim without a BatchNorm is scored by ``l2`` where the criterion is ``bn``.
    """
    if criterion == "random":
        draws = np.random.default_rng(seed)
        return {group.dim: draws.random(int(group.dim.size)) for group in groups}
    power = 1 if criterion == "l1" else 2
    found = _magnitudes(graph, groups, power)
    if criterion == "bn":
        found |= batch_norm_gains(graph, groups)
    return {group.dim: _normalised(found[group.dim]) for group in groups}


def _normalised(scores: np.ndarray) -> np.ndarray:
    mean = float(scores.mean())
    return scores / mean if mean > 0 and np.isfinite(mean) else np.nan_to_num(scores)


def _magnitudes(graph: Graph, groups: Sequence[Group], power: int) -> Scores:
    """The p-norm of each index over its slices of all members that count."""
    scales = _batch_norm_scales(graph)
    totals: Scores = {group.dim: np.zeros(int(group.dim.size)) for group in groups}
    wanted: dict[Parameter, dict[int, set[Dim]]] = {}
    for group in groups:
        for member in _scored_members(group):
            wanted.setdefault(member.parameter, {}).setdefault(member.axis, set()).add(group.dim)
    for parameter, axes in wanted.items():
        scale = {axis: scales[parameter, axis] for axis in range(parameter.rank) if (parameter, axis) in scales}
        for axis, sums in axis_sums(parameter.tensor, list(axes), power, scale).items():
            accumulate(graph.axes.of[parameter][axis], sums, {dim: totals[dim] for dim in axes[axis]})
    return {dim: np.sqrt(total) if power == 2 else total for dim, total in totals.items()}


def _scored_members(group: Group) -> list[Member]:
    """Members that say how important an index is: weights; where there are none, vectors; else nothing does."""
    trained = [m for m in group.members if m.parameter.kind == "parameter" and _is_real(m.parameter)]
    weights = [m for m in trained if sum(size != 1 for size in m.parameter.shape) > 1]
    return weights or trained or [m for m in group.members if _is_real(m.parameter)]


def _is_real(parameter: Parameter) -> bool:
    dtype = parameter.dtype
    return isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)


def axis_sums(
    tensor: torch.Tensor, axes: Sequence[int], power: int, scale: Mapping[int, np.ndarray]
) -> dict[int, np.ndarray]:
    """For each axis the sums of |w|^power over all others, in one pass; ``scale`` multiplies along an axis first."""
    tensor = tensor.detach()
    result = {axis: np.zeros(tensor.shape[axis]) for axis in axes}
    rows = max(1, _CHUNK // max(1, tensor[:1].numel()))
    for start in range(0, tensor.shape[0], rows):
        chunk = _widened(tensor[start : start + rows])
        for axis, factors in scale.items():
            part = factors[start : start + rows] if axis == 0 else factors
            chunk = chunk * torch.as_tensor(part, dtype=chunk.dtype).reshape([-1] + [1] * (chunk.dim() - 1 - axis))
        chunk = chunk.abs() if power == 1 else chunk.square()
        for axis in axes:
            others = [other for other in range(chunk.dim()) if other != axis]
            sums = (chunk.sum(others, dtype=torch.float64) if others else chunk.double()).numpy()
            if axis == 0:
                result[axis][start : start + rows] += sums
            else:
                result[axis] += sums
    return result


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    """Real numbers wide enough to be squared and summed."""
    tensor = tensor.cpu()
    if tensor.is_complex():
        return tensor.abs()
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def accumulate(extent: Extent, values: np.ndarray, totals: Mapping[Dim, np.ndarray]) -> None:
    """Add the values along an axis to the indices of the Dims it is made of; a Dim that occurs twice gets both."""
    found = resolve(extent)
    if isinstance(found, Dim):
        if found in totals:
            totals[found][:] += values
        return
    if isinstance(found, Product):
        grid = values.reshape([int(size_of(factor)) for factor in found.factors])
        for place, factor in enumerate(found.factors):
            others = tuple(other for other in range(grid.ndim) if other != place)
            accumulate(factor, grid.sum(others), totals)
        return
    offset = 0
    for segment in found.segments:
        size = int(size_of(segment))
        accumulate(segment, values[offset : offset + size], totals)
        offset += size


def _batch_norm_scales(graph: Graph) -> dict[Axis, np.ndarray]:
    """|gamma| / sqrt(var + eps) for the output axis of each weight whose result a BatchNorm alone reads."""
    scales: dict[Axis, np.ndarray] = {}
    for node in graph.nodes:
        axis = _normalised_weight(node)
        if axis is None:
            continue
        gain, variance = node.inputs[1], node.inputs[4]
        factors = (_vector(variance) + float(node.attributes["eps"])) ** -0.5
        scales[axis] = factors * np.abs(_vector(gain)) if gain is not None else factors
    return scales


def _normalised_weight(node: Node) -> Axis | None:
    """The weight axis whose rows a BatchNorm scales, where the result is the same as folding it into the weight."""
    if node.op != "batch_norm" or node.attributes.get("training") or len(node.inputs) < 5:
        return None
    x, gain, variance = node.inputs[0], node.inputs[1], node.inputs[4]
    if not isinstance(variance, Parameter) or not (gain is None or isinstance(gain, Parameter)):
        return None
    if not isinstance(x, Value) or x.producer is None or len(x.uses) != 1 or x.producer.op not in _WEIGHT_AXIS:
        return None
    operand, axis = _WEIGHT_AXIS[x.producer.op]
    weight = x.producer.inputs[operand]
    if not isinstance(weight, Parameter) or len(weight.uses) != 1 or weight.rank < 2:
        return None
    axis %= weight.rank
    return (weight, axis) if weight.shape[axis] == variance.shape[0] else None


def _vector(parameter: object) -> np.ndarray:
    assert isinstance(parameter, Parameter)
    return parameter.tensor.detach().cpu().double().numpy()


def batch_norm_gains(graph: Graph, groups: Sequence[Group]) -> Scores:
    """Sums of |gamma| over the BatchNorms of each Dim that has one."""
    wanted = {group.dim for group in groups}
    totals: Scores = {}
    for _, node in graph.walk():
        gain = node.inputs[1] if node.op == "batch_norm" and len(node.inputs) > 1 else None
        if not isinstance(gain, Parameter):
            continue
        extent = graph.axes.of[gain][0]
        sums = {dim: np.zeros(int(dim.size)) for dim in leaves(extent) if dim in wanted}
        accumulate(extent, np.abs(_vector(gain)), sums)
        for dim, values in sums.items():
            totals[dim] = totals.get(dim, 0) + values
    return totals
