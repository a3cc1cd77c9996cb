"""What a region computes by its terms, in torch: the reference for planners and for printers of kernels."""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from regauge.ir.affine import Affine
from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.region import Region, Term
from regauge.ir.graph import Value
from regauge.ir.scalars import PRIMITIVES, REDUCTIONS
from regauge.ir.sizes.expressions import evaluate, solve_bindings


def run_region(region: Region, tensors: Mapping[Value, torch.Tensor]) -> dict[Value, torch.Tensor]:
    """The outputs of a region in double precision; ``tensors`` holds what it reads."""
    sizes = _sizes(region, tensors)
    known: dict[Term, Any] = {}
    for term in region.terms:
        known[term] = _value(region, term, known, tensors, sizes)
    return {value: _output(region, value, known[region.results[value]], sizes) for value in region.outputs}


def _sizes(region: Region, tensors: Mapping[Value, torch.Tensor]) -> dict[Any, int]:
    """How many indices each loop has; of axes that are several loops, all but one have fixed sizes."""
    sizes = {dim: dim.size for dim in region.sized if isinstance(dim.size, int)}
    bindings: dict[Any, int] = {}
    for load in region.loads:
        shape = tensors[load.value.value].shape
        solve_bindings(load.value.value.shape, shape, bindings)
        for axis, size in zip(load.value.layout, shape, strict=True):
            open_ = [dim for dim in axis if dim not in sizes]
            if len(open_) == 1:
                sizes[open_[0]] = size // math.prod(sizes.get(dim, 1) for dim in axis)
    for dim, length in region.lengths.items():
        if all(part in sizes for part, _ in length.sizes):
            sizes[dim] = length.start(sizes)
    sizes.update({dim: evaluate(dim.size, bindings) for dim in region.sized if dim not in sizes})
    return sizes


def _value(region: Region, term: Term, known: Mapping[Term, Any], tensors: Any, sizes: Mapping[Any, int]) -> Any:
    loops = region.loops
    if term.op == "number":
        return term.value
    if term.op == "count":
        return math.prod(sizes[dim] for dim in term.over)
    args = [known[arg] for arg in term.args]
    if term.op == "load":
        return _read(term, args, loops, tensors[term.value.value], sizes)
    if term.op == "inside":
        place, length = (_places(one, loops, sizes) for one in term.value)
        return (place >= 0) & (place < length)
    if term.op == "result":
        return args[0]
    if term.op in PRIMITIVES:
        return PRIMITIVES[term.op](*args)
    wide = torch.as_tensor(args[0], dtype=torch.float64)
    wide = wide.reshape((1,) * (len(loops) - wide.dim()) + tuple(wide.shape))
    full = wide.expand([sizes[dim] if dim in term.over else size for dim, size in zip(loops, wide.shape, strict=True)])
    return REDUCTIONS[term.op](full, tuple(place for place, dim in enumerate(loops) if dim in term.over))


def _places(place: Affine, loops: Sequence[Dim], sizes: Mapping[Any, int]) -> torch.Tensor:
    """A place for each index of the loops."""
    found = torch.full((1,) * len(loops), place.start(sizes))
    for dim, step in place.steps:
        shape = [sizes[dim] if own is dim else 1 for own in loops]
        found = found + step * torch.arange(sizes[dim]).reshape(shape)
    return found


def _read(
    term: Term, guards: Sequence[torch.Tensor], loops: Sequence[Dim], tensor: torch.Tensor, sizes: Mapping[Any, int]
) -> torch.Tensor:
    """What a tensor holds for each index of the loops; zero where a guard does not hold."""
    tensor = tensor.double() if tensor.is_floating_point() else tensor
    places, picked = term.value.places, term.value.picked
    dims = [dim for axis in term.value.layout for dim in axis]
    split = tensor.reshape([sizes[dim] for dim in dims])
    there = reduce(torch.logical_and, guards[len(picked) :], torch.tensor(True))
    indices = []
    for dim in dims:
        index = guards[picked.index(dim)] if dim in picked else _places(places[dim], loops, sizes)
        assert bool(((index >= 0) & (index < sizes[dim]) | ~there).all()), f"{term.value.value} is read outside"
        indices.append(index.clamp(0, max(sizes[dim] - 1, 0)))
    found = split[tuple(indices)] if indices else split.reshape((1,) * len(loops))
    return torch.where(there, found, 0) if guards else found


def _output(region: Region, value: Value, found: Any, sizes: Mapping[Any, int]) -> torch.Tensor:
    loops, layout = region.loops, region.layouts[value]
    own = [dim for axis in layout for dim in axis]
    wide = torch.as_tensor(found, dtype=torch.float64)
    wide = wide.reshape((1,) * (len(loops) - wide.dim()) + tuple(wide.shape))
    full = wide.expand([sizes[dim] if dim in own else 1 for dim in loops])
    ordered = full.permute([*map(loops.index, own), *(i for i, dim in enumerate(loops) if dim not in own)])
    return ordered.reshape([math.prod(sizes[dim] for dim in axis) for axis in layout])
