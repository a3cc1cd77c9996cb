"""Scores: one number per index of each Dim, and how they come from what its members say.

Of a group with majors there is one for each index in each index of these: [*sizes of the majors, size].

A Dim's members are (parameter, axis) pairs; index i of the Dim owns a slice of each. A score sums something over these
slices, reduces over members, and normalises over the indices. What the sums are of is told by the files beside this
one; :mod:`regauge.passes.pruning.score_table` has them all by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch

from regauge.ir.dims.extents import Dim, Extent, Product, resolve, size_of
from regauge.ir.dims.groups import Group, Member
from regauge.ir.dims.kept import numbered
from regauge.ir.graph import Node, Parameter

Scores: TypeAlias = dict[Dim, np.ndarray]
Axis: TypeAlias = tuple[Parameter, int]
MemberScores: TypeAlias = dict[Dim, list[np.ndarray]]
"""What each member of a Dim says of its indices, in the order of :func:`scored_members`."""
Reduce: TypeAlias = Literal["sum", "mean", "max", "prod", "first"]
Normalise: TypeAlias = Literal["none", "mean", "sum", "max", "minmax", "zscore"]


def scored_members(group: Group, *, codes: bool = False) -> list[Member]:
    """Members that say how important an index is: weights; where there are none, vectors; else nothing does.

    With ``codes``, weights that are stored as integers, too: what they stand for is given by :func:`numbers`.
    """

    def says(parameter: Parameter) -> bool:
        return is_real(parameter) or codes and _decoder(parameter) is not None

    trained = [m for m in group.members if m.parameter.kind == "parameter" and says(m.parameter)]
    weights = [m for m in trained if sum(size != 1 for size in m.parameter.shape) > 1]
    return weights or trained or [m for m in group.members if is_real(m.parameter)]


def is_real(parameter: Parameter) -> bool:
    """Whether a parameter holds numbers that have a magnitude."""
    dtype = parameter.dtype
    return isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)


def numbers(parameter: Parameter) -> torch.Tensor:
    """The data of a parameter, and of codes the numbers that they stand for."""
    node = _decoder(parameter)
    if node is None:
        return parameter.tensor.detach()
    operands = [value.tensor.detach() if isinstance(value, Parameter) else value for value in node.inputs]
    found: torch.Tensor = node.operator.evaluate(*operands, **node.attributes)
    return found


def _decoder(parameter: Parameter) -> Node | None:
    """The node that makes numbers of codes, one for each."""
    for node, slot in parameter.uses if not is_real(parameter) else ():
        known = all(isinstance(value, Parameter) for _, value in node.operands())
        if node.operator.coding and slot == 0 and known and node.output.shape == parameter.shape:
            return node
    return None


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


def on_dim(extent: Extent, dim: Dim, values: np.ndarray) -> np.ndarray:
    """The values along an axis, added up for each index of one Dim in it."""
    total = {dim: np.zeros(int(dim.size))}
    accumulate(extent, values, total)
    return total[dim]


def summed(axes: Sequence[Extent], axis: int, dims: Sequence[Dim], tensor: torch.Tensor) -> np.ndarray:
    """The entries of a tensor with these axes, added up for each combination of indices of Dims, the last on ``axis``.

    Returns [*sizes of the Dims].
    """
    sizes = [int(dim.size) for dim in dims]
    places = numbered(axes, axis, dims)
    others = [at for at, size in enumerate(places.shape) if size == 1 and at != axis]
    values = (tensor.sum(others, keepdim=True, dtype=torch.float64) if others else tensor.double()).numpy()
    places = np.broadcast_to(places, values.shape)
    found = np.bincount(places[places >= 0], values[places >= 0], int(np.prod(sizes)))
    return found.reshape(sizes)


def profile(scores: np.ndarray) -> np.ndarray:
    """What goes with each further index, the least first: one index of each index of the majors at a time."""
    return np.asarray(np.sort(scores, -1).reshape(-1, scores.shape[-1]).sum(0)) if scores.ndim > 1 else scores


def reduced(members: Sequence[np.ndarray], how: Reduce, shape: int | tuple[int, ...]) -> np.ndarray:
    """One score per index from what each member says; zeros where no member says anything."""
    if not members:
        return np.zeros(shape)
    table = np.stack(members)
    if how == "first":
        return np.asarray(table[0])
    return np.asarray(getattr(table, how)(axis=0))


def normalised(scores: np.ndarray, how: Normalise) -> np.ndarray:
    """Scores of one Dim on a scale of their own; they keep their order. What is not finite counts as zero.

    ``mean``, ``sum`` and ``max`` divide by that of the magnitudes; ``minmax`` maps onto 0 to 1; ``zscore`` takes the
    mean away and divides by the deviation.
    """
    scores = np.nan_to_num(scores, posinf=0.0, neginf=0.0)
    whole, shift, scale = profile(scores), 0.0, 1.0
    if how in ("mean", "sum", "max"):
        scale = float(getattr(np.abs(whole), how)())
    elif how == "minmax":
        shift, scale = float(whole.min()), float(whole.max() - whole.min())
    elif how == "zscore":
        shift, scale = float(whole.mean()), float(whole.std())
    moved = scores - shift * whole.size / scores.size  # each index of the majors bears its part of the shift
    found: np.ndarray = moved / scale if scale > 0 else moved
    return found
