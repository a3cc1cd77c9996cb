"""Where a Dim is in tensors: factors laid along axes, and sums over the slices that each index owns."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from regauge.ir.dims.extents import Dim, Extent, Product, leaves, resolve, size_of
from regauge.ir.dims.groups import Member
from regauge.ir.dims.local_axes import LocalAxes
from regauge.ir.graph import Graph, Parameter

Factors = Mapping[Dim, torch.Tensor]  # for each Dim one number per index


def laid_along(extent: Extent, factors: Factors) -> torch.Tensor | None:
    """One factor per position of an axis: those of its Dims multiplied; None where it has none of the Dims."""
    if not any(dim in factors for dim in leaves(extent)):
        return None
    given = next(iter(factors.values()))
    return _laid(extent, factors, given)


def _laid(extent: Extent, factors: Factors, like: torch.Tensor) -> torch.Tensor:
    found = resolve(extent)
    if isinstance(found, Dim):
        own = factors.get(found)
        return torch.ones(int(size_of(found)), dtype=like.dtype, device=like.device) if own is None else own
    if isinstance(found, Product):
        result = torch.ones(1, dtype=like.dtype, device=like.device)
        for factor in found.factors:
            result = (result[:, None] * _laid(factor, factors, like)[None, :]).reshape(-1)
        return result
    return torch.cat([_laid(segment, factors, like) for segment in found.segments])


def multiplied(tensor: torch.Tensor, axes: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """A tensor times a vector along each of some axes."""
    for axis, vector in axes.items():
        tensor = tensor * vector.to(tensor.dtype).reshape([-1 if a == axis else 1 for a in range(tensor.dim())])
    return tensor


def sums_by_index(extent: Extent, values: torch.Tensor, dim: Dim) -> torch.Tensor:
    """Sums of the values along an axis over the positions that each index of a Dim owns, [indices]."""
    found = resolve(extent)
    if found is dim:
        return values
    if isinstance(found, Dim) or dim not in leaves(found):
        return values.new_zeros(int(dim.size))
    if isinstance(found, Product):
        grid = values.reshape([int(size_of(factor)) for factor in found.factors])
        parts = [
            sums_by_index(factor, grid.sum([a for a in range(grid.dim()) if a != place]), dim)
            for place, factor in enumerate(found.factors)
        ]
    else:
        sizes = [int(size_of(segment)) for segment in found.segments]
        pieces = torch.split(values, sizes)
        parts = [sums_by_index(s, v, dim) for s, v in zip(found.segments, pieces, strict=True)]
    return torch.stack(parts).sum(0)


def along_axis(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """Sums over all axes but one."""
    others = [other for other in range(tensor.dim()) if other != axis]
    return tensor.sum(others) if others else tensor


def contracted_axes(graph: Graph) -> set[Member]:
    """The axes of parameters that their nodes contract with an input: where a Dim is read, not where it is made."""
    found: set[Member] = set()
    for _, node in graph.walk():
        slots = [(slot, value) for slot, value in node.operands() if isinstance(value, Parameter)]
        if not slots or node.operator.rule is None:
            continue
        local = LocalAxes(node)
        for slot, parameter in slots:
            for axis, extent in enumerate(local.operands[slot]):
                dims = leaves(extent)
                if dims and all(local.roles.get(dim) == "contract" for dim in dims):
                    found.add(Member(parameter, axis))
    return found


def directions(graph: Graph) -> set[Member]:
    """The axes of parameters whose slices only point somewhere, while a factor beside them says how far: weight norm.

    A factor of zero silences such a slice. The slice itself must not be zero, which is no direction: 0 / 0.
    """
    found: set[Member] = set()
    for _, node in graph.walk():
        slots = [(slot, value) for slot, value in node.operands() if isinstance(value, Parameter)]
        factors = node.operator.zeroed_by
        if not slots or not factors or node.operator.rule is None:
            continue
        local, names = LocalAxes(node), node.operator.slots
        named = [slot for slot in range(len(local.operands)) if slot < len(names) and names[slot] in factors]
        scaled = {dim for slot in named for extent in local.operands[slot] for dim in leaves(extent)}
        for slot, parameter in slots:
            if slot not in named:
                axes = enumerate(local.operands[slot])
                found |= {Member(parameter, axis) for axis, extent in axes if scaled & set(leaves(extent))}
    return found


def normalised_dims(graph: Graph) -> set[Dim]:
    """Dims over which something normalises or averages: there the cut network is not the masked one."""
    return {
        dim
        for node, role, dims in graph.axes.ends
        if role in ("normalise", "reduce") and node.op != "sum"
        for dim in dims
    }
