"""What a region computes by its terms, in torch: the reference for planners and for printers of kernels."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from regauge.ir.fusion.region import Region, Term
from regauge.ir.graph import Value
from regauge.ir.scalars import PRIMITIVES, REDUCTIONS


def run_region(region: Region, tensors: Mapping[Value, torch.Tensor]) -> dict[Value, torch.Tensor]:
    """The outputs of a region in double precision; ``tensors`` holds what it reads."""
    sizes = _sizes(region, tensors)
    known: dict[Term, Any] = {}
    for term in region.terms:
        known[term] = _value(region, term, known, tensors, sizes)
    return {value: _output(region, value, known[region.results[value]], sizes) for value in region.outputs}


def _sizes(region: Region, tensors: Mapping[Value, torch.Tensor]) -> dict[Any, int]:
    """How many indices each loop has; of axes that are several loops, all but one have fixed sizes."""
    sizes = {dim: dim.size for dim in region.every_loop if isinstance(dim.size, int)}
    for load in region.loads:
        for axis, size in zip(load.value.layout, tensors[load.value.value].shape, strict=True):
            open_ = [dim for dim in axis if dim not in sizes]
            if len(open_) == 1:
                sizes[open_[0]] = size // math.prod(sizes.get(dim, 1) for dim in axis)
    sizes.update({joint: sum(sizes[part] for part in parts) for joint, parts in region.joints.items()})
    return sizes


def _value(region: Region, term: Term, known: Mapping[Term, Any], tensors: Any, sizes: Mapping[Any, int]) -> Any:
    loops = region.every_loop
    if term.op == "number":
        return term.value
    if term.op == "count":
        return math.prod(sizes[dim] for dim in term.over)
    if term.op == "load":
        tensor = tensors[term.value.value]
        tensor = tensor.double() if tensor.is_floating_point() else tensor
        own = [dim for axis in term.value.layout for dim in axis]
        split = tensor.reshape([sizes[dim] for dim in own])
        order = sorted(range(len(own)), key=lambda place: loops.index(own[place]))
        return split.permute(order).reshape([sizes[dim] if dim in own else 1 for dim in loops])
    args = [known[arg] for arg in term.args]
    if term.op == "result":
        return args[0]
    if term.op in PRIMITIVES:
        return PRIMITIVES[term.op](*args)
    if term.op == "joined":
        joint, parts = loops.index(term.value), region.joints[term.value]
        wide = [arg.transpose(joint, loops.index(part)) for arg, part in zip(args, parts, strict=True)]
        shape = torch.broadcast_shapes(*(arg.select(joint, 0).shape for arg in wide))
        return torch.cat([arg.movedim(joint, 0).expand(-1, *shape) for arg in wide]).movedim(0, joint)
    wide = torch.as_tensor(args[0], dtype=torch.float64)
    wide = wide.reshape((1,) * (len(loops) - wide.dim()) + tuple(wide.shape))
    full = wide.expand([sizes[dim] if dim in term.over else size for dim, size in zip(loops, wide.shape, strict=True)])
    return REDUCTIONS[term.op](full, tuple(place for place, dim in enumerate(loops) if dim in term.over))


def _output(region: Region, value: Value, found: Any, sizes: Mapping[Any, int]) -> torch.Tensor:
    loops, layout = region.every_loop, region.layouts[value]
    own = [dim for axis in layout for dim in axis]
    wide = torch.as_tensor(found, dtype=torch.float64)
    wide = wide.reshape((1,) * (len(loops) - wide.dim()) + tuple(wide.shape))
    full = wide.expand([sizes[dim] if dim in own else 1 for dim in loops])
    ordered = full.permute([*map(loops.index, own), *(i for i, dim in enumerate(loops) if dim not in own)])
    return ordered.reshape([math.prod(sizes[dim] for dim in axis) for axis in layout])
